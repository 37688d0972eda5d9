"""Datasets that are published as files with checksums: found, checked, decoded, or refused by name."""

import gzip
import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpnopt.experiments.data.entry import Arrays, Labelled
from ddpnopt.experiments.data.packages import Package
from ddpnopt.experiments.data.places import cache, find

_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}  # by hexadecimal digits


@dataclass(frozen=True)
class File:
    """A published file.

    Attributes:
        name: without ``.gz``.
        checksum: md5, sha1 or sha256, in hexadecimal, of the *uncompressed* content. (Distributions recompress
            the files, so the sum of a compressed file means nothing.)
    """

    name: str
    checksum: str

    def check(self, content: bytes, where: object) -> None:
        """Refuse content that is not the published one; ``where`` names it in the error."""
        algorithm = _ALGORITHMS[len(self.checksum)]
        found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
        if found != self.checksum:
            raise ValueError(f"{where} is not the published file: {algorithm} {found}, expected {self.checksum}")

    def read(self, folder: Path) -> bytes:
        """Return the checked, uncompressed content; the plain file is taken where a ``.gz`` lies beside it."""
        path = find(folder, self.name)
        if path is None:
            raise ValueError(f"no file {self.name} or {self.name}.gz in {folder}")
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        self.check(content, path)
        return content


@dataclass(frozen=True)
class FileSet:
    """A set published as files with a standard train/test split; reads it when called.

    The last training samples are the validation part.

    Attributes:
        key: name of the set, and of its folder in the cache.
        files: in the order in which ``decode`` wants them.
        decode: from the files' contents to inputs and labels of the train and the test part.
        package: what holds the files in a package registry; None where none does.
        archive: name of the folder in which the files are published, sought beside ``key``; None where they
            are published without one.
        system: folder and name of the system package that puts the files there, if any.
        held_out: number of training samples that become the validation part.
    """

    key: str
    files: tuple[File, ...]
    decode: Callable[[Sequence[bytes]], tuple[Labelled, Labelled]]
    package: Package | None = None
    archive: str | None = None
    system: tuple[Path, str] | None = None
    held_out: int = 5000

    def __call__(self, folder: Path | None) -> Arrays:
        """Read, check and split; ``folder`` None looks where :func:`ddpnopt.experiments.data.load` says."""
        home = self.home(folder)
        if home is None:
            raise ValueError(f"{self.key} is not in {cache() if folder is None else folder}; {self.advice()}")
        (x, y), test = self.decode(self.contents(home))
        cut = len(y) - self.held_out
        return Arrays((x[:cut], y[:cut]), (x[cut:], y[cut:]), test)

    def home(self, folder: Path | None) -> Path | None:
        """The folder that holds the files, or most of them, or None where there is not one."""
        parent = cache() if folder is None else folder
        places = [parent / name for name in (self.key, self.archive, ".") if name is not None]
        if folder is None and self.system is not None:
            places.append(self.system[0])
        found = [sum(find(place, file.name) is not None for file in self.files) for place in places]
        return places[found.index(max(found))] if max(found) else None

    def contents(self, home: Path) -> list[bytes]:
        """Checked contents of the files in ``home``; a missing or altered one is refused by name."""
        try:
            return [file.read(home) for file in self.files]
        except ValueError as error:
            fetch = "" if self.package is None else f"run `ddpnopt data fetch {self.key}`, or "
            raise ValueError(f"{error}; {fetch}put the published file there") from error

    def advice(self) -> str:
        """What to do when nothing is there."""
        ways = [] if self.package is None else [f"run `ddpnopt data fetch {self.key}`"]
        if self.system is not None:
            ways.append(f"install the Debian package {self.system[1]}")
        ways.append(f"name by --data or DDPNOPT_DATA the folder with {', '.join(file.name for file in self.files)}")
        return ", or ".join(ways)
