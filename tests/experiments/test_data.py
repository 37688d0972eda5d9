import gzip
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddpnopt.experiments import data
from ddpnopt.experiments.data import DATASETS, IdxFiles, load, split
from ddpnopt.experiments.idx import read_idx

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: NDArray[np.uint8]) -> bytes:
    lengths = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + lengths + array.tobytes()


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[IdxFiles, Path]:
    """A set of 12 + 4 pictures of 2 x 2 pixels in four files, two of them compressed."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.RandomState(0)
    arrays = [random.randint(0, 256, shape).astype(np.uint8) for shape in ((12, 2, 2), (12,), (4, 2, 2), (4,))]
    contents = [idx(array) for array in arrays]
    for place, (name, content) in enumerate(zip(NAMES, contents, strict=True)):
        if place % 2:
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    sums = [hashlib.md5(content, usedforsecurity=False).hexdigest() for content in contents]
    md5 = (sums[0], sums[1], sums[2], sums[3])
    return IdxFiles("pictures", md5, tmp_path / "nowhere", "a-package", held_out=5), folder


@pytest.mark.parametrize("name", ["wine", "iris", "digits"])
def test_split_is_disjoint_complete_stratified_and_fixed(name: str) -> None:
    y = np.concatenate([part.y.numpy() for part in (load(name).train, load(name).validation, load(name).test)])
    y.sort()
    train, validation, test = split(y)
    assert sorted([*train, *validation, *test]) == list(range(len(y)))
    for label in np.unique(y):
        count = (y == label).sum()
        assert abs((y[test] == label).sum() - 0.2 * count) <= 0.5
        assert abs((y[validation] == label).sum() - 0.1 * count) <= 0.5
    assert all(np.array_equal(a, b) for a, b in zip(split(y), (train, validation, test), strict=True))


def test_the_split_is_the_same_on_every_machine() -> None:
    _, validation, test = split(np.repeat([0, 1], 50))
    assert (validation[:4].tolist(), test[:4].tolist()) == ([19, 23, 30, 41], [5, 8, 13, 15])


@pytest.mark.parametrize("name", ["wine", "iris"])
def test_tables_are_standardised_by_feature_with_the_train_part_only(name: str) -> None:
    dataset = load(name)
    x = dataset.train.x
    assert torch.allclose(x.mean(0), torch.zeros(x.shape[1]), atol=1e-5)
    assert torch.allclose(x.std(0, unbiased=False), torch.ones(x.shape[1]), atol=1e-5)
    assert dataset.test.x.mean(0).abs().max() > 0.02  # its own statistics were not used


def test_pictures_have_one_mean_and_deviation_from_the_train_part_only() -> None:
    dataset = load("digits-images")
    assert dataset.train.x.shape[1:] == (1, 8, 8)
    assert float(dataset.train.x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(dataset.train.x.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
    assert abs(float(dataset.test.x.mean())) > 1e-4
    assert torch.equal(dataset.train.x.flatten(1), load("digits").train.x)


def test_a_constant_feature_becomes_zero() -> None:
    mean, deviation = data._statistics(np.ones((3, 2)), by_feature=True)
    assert mean.tolist() == [1, 1]
    assert deviation.tolist() == [1, 1]


def test_idx_set_is_read_and_its_last_training_samples_are_held_out(pictures: tuple[IdxFiles, Path]) -> None:
    source, folder = pictures
    arrays = source(folder)
    assert [len(y) for _, y in (arrays.train, arrays.validation, arrays.test)] == [7, 5, 4]
    everything = read_idx(folder, NAMES[0], source.md5[0])
    assert np.array_equal(np.concatenate([arrays.train[0], arrays.validation[0]]), everything)


def test_idx_set_is_found_under_its_own_name_and_by_the_environment(
    pictures: tuple[IdxFiles, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = pictures
    assert len(source(folder.parent).train[1]) == 7
    monkeypatch.setenv(data.FOLDER_VARIABLE, str(folder.parent))
    assert len(source(None).train[1]) == 7


def test_missing_files_say_what_to_install(pictures: tuple[IdxFiles, Path], tmp_path: Path) -> None:
    source, _ = pictures
    with pytest.raises(ValueError, match=r"install the Debian package a-package, or name by --data or DDPNOPT_DATA"):
        source(tmp_path / "empty")


@pytest.mark.parametrize("place", range(4))
def test_an_altered_byte_is_refused_by_the_files_name(pictures: tuple[IdxFiles, Path], place: int) -> None:
    source, folder = pictures
    path = next(folder.glob(f"{NAMES[place]}*"))
    content = path.read_bytes()
    raw = bytearray(gzip.decompress(content) if path.suffix == ".gz" else content)
    raw[-1] ^= 1
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not the published file")):
        source(folder)


def test_a_torn_archive_is_refused_by_the_files_name(pictures: tuple[IdxFiles, Path]) -> None:
    source, folder = pictures
    path = folder / f"{NAMES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
        source(folder)


def test_a_missing_fellow_is_named(pictures: tuple[IdxFiles, Path]) -> None:
    source, folder = pictures
    (folder / NAMES[3]).unlink()
    with pytest.raises(ValueError, match=NAMES[3]):
        source(folder)


def test_unknown_dataset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'mnist2'; choose one of: wine, iris, digits"):
        load("mnist2")


def test_entries_agree_with_their_data() -> None:
    for name in ("wine", "iris", "digits", "digits-images"):
        dataset, entry = load(name), DATASETS[name]
        assert dataset.train.x.shape[1:] == entry.shape
        assert dataset.train.y.unique().tolist() == list(range(entry.classes))
        assert dataset.source == replace(entry)
