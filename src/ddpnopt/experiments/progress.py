"""Show how far a run is: a bar on a terminal, plain lines elsewhere; always on the error stream."""

import sys
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Reporter(Protocol):
    """What the training loop tells whoever watches it."""

    def step(self, done: int, total: int, loss: float) -> None:
        """One step more is done; ``loss`` is its batch's."""

    def line(self, text: str) -> None:
        """Something worth a line of its own, such as the end of an epoch."""


class Silent:
    """Tells nobody."""

    def step(self, done: int, total: int, loss: float) -> None:
        """Say nothing."""

    def line(self, text: str) -> None:
        """Say nothing."""


class Display:
    """A context that shows progress on the error stream: a bar on a terminal, else only the lines.

    Args:
        label: what stands before the bar; may be changed while it runs.
        console: where to; default the error stream.
    """

    def __init__(self, label: str, console: Console | None = None) -> None:
        self.label = label
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self.on_terminal,
        )
        self._task: TaskID = self._bar.add_task(label, total=None, note="")

    @property
    def on_terminal(self) -> bool:
        """Whether a bar is shown."""
        return self._console.is_terminal

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, done: int, total: int, loss: float) -> None:
        """Move the bar to ``done`` of ``total``."""
        self._bar.update(self._task, completed=done, total=total, description=self.label, note=f"loss {loss:.4g}")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self.on_terminal:
            self._console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)  # never wrapped or coloured in a log
