import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpnopt.experiments import files
from experiments.study_tools import environment


def test_a_write_that_is_killed_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_leaves_what_another_process_writes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "file", os.replace

    def meanwhile(*names: Any) -> None:
        monkeypatch.setattr("os.replace", replace)
        with monkeypatch.context() as other:
            other.setattr("os.getpid", lambda: -1)
            files.write_atomic(path, b"other")
        assert path.read_bytes() == b"other"
        replace(*names)

    monkeypatch.setattr("os.replace", meanwhile)
    files.write_atomic(path, b"own")
    assert path.read_bytes() == b"own"
    assert list(tmp_path.iterdir()) == [path]


HELD_UP = """
import os, sys
from pathlib import Path
from ddpnopt.experiments import files

def wait(*_):
    print("written", flush=True)
    sys.stdin.read()

os.replace = wait
files.write_atomic(Path("file"), b"half")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="process start times are read from /proc")
def test_what_a_killed_process_left_is_deleted_by_the_next_write_of_the_same_file(tmp_path: Path) -> None:
    path, user = tmp_path / "file", tmp_path / "file.bak.tmp"
    user.touch()
    words = [sys.executable, "-c", HELD_UP]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"written\n"
        files.write_atomic(path, b"own")
        (left,) = set(tmp_path.iterdir()) - {path, user}  # it may still go on
        assert left.read_bytes() == b"half"
        other.kill()
    files.write_atomic(user, b"")
    assert left.exists()
    files.write_atomic(path, b"own again")
    assert set(tmp_path.iterdir()) == {path, user}
