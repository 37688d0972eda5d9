"""How far a long command is."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Progress on the error stream: a bar on a terminal, else a line each twentieth of the way."""

    def __init__(self, title: str, total: int) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=total)
        self._title, self._total, self._done = title, total, 0
        self._lines = not console.is_terminal

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """One run more is done."""
        self._done += 1
        self._bar.advance(self._task)
        if self._lines and self._done * 20 // self._total > (self._done - 1) * 20 // self._total:
            print(f"{self._title}: {self._done} of {self._total} runs", file=sys.stderr, flush=True)
