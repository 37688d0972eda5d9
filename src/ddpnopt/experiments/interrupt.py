"""Stop between two steps, not inside one, when the user presses Ctrl-C or the system asks to end."""

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class StoppedError(Exception):
    """A run that stopped early, at a step boundary, with a checkpoint on disk.

    Attributes:
        folder: the run's folder, which ``--resume`` takes.
        step: steps done.
        total: steps planned.
    """

    def __init__(self, folder: Path, step: int, total: int) -> None:
        super().__init__(f"stopped after step {step} of {total}; checkpoint in {folder}")
        self.folder, self.step, self.total = folder, step, total


class StopRequest:
    """Context in which Ctrl-C and SIGTERM are noted instead of obeyed at once; a second one is obeyed.

    Args:
        patient: whether a second one is not obeyed either: a launcher passes on what the terminal has sent already.

    Call the object to learn whether a stop was asked for. Signals reach the main thread only, so enter the
    context there.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._patient = patient
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
