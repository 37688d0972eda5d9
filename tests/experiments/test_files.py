import os
from pathlib import Path
from typing import Any

import pytest

from ddpnopt.experiments import files


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
