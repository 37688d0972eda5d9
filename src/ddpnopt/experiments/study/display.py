"""Show how far the runs of a study are: a bar on a terminal, now and then a line elsewhere; on the error stream."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ddpnopt.experiments.study.database_lab import Progress

_EVERY = 30.0  # seconds between the lines of a log


class RunsDisplay:
    """A context that shows what it is called with.

    Args:
        console: where to; default the error stream.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs{task.fields[failed]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, failed="")
        self._label, self._shown, self._began = "", Progress(0, 0, 0, 0), 0.0
        self._line_at = 0.0

    def __enter__(self) -> "RunsDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, label: str) -> None:
        """Show what follows under another name."""
        self._label, self._shown = label, Progress(0, 0, 0, 0)

    def __call__(self, progress: Progress) -> None:
        """Show progress."""
        now, ended = time.monotonic(), progress.done + progress.failed
        failed = f", {progress.failed} failed" * (progress.failed > 0)
        new = (progress.total, progress.before) != (self._shown.total, self._shown.before)
        if new:  # other runs than before
            self._began = now
            self._bar.reset(self._task, total=progress.total, completed=ended, description=self._label, failed=failed)
        self._bar.update(self._task, completed=ended, failed=failed)
        last = ended == progress.total and progress != self._shown
        if not self._console.is_terminal and (new or last or now - self._line_at >= _EVERY):
            self.line(f"{self._label}: {ended} of {progress.total} runs{failed}{self._left(progress, now)}")
            self._line_at = now
        self._shown = progress

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._console.is_terminal:
            self._console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)  # never wrapped or coloured in a log

    def _left(self, progress: Progress, now: float) -> str:
        ended = progress.done + progress.failed
        here = ended - progress.before
        if here <= 0 or ended == progress.total:
            return ""
        minutes = (now - self._began) / here * (progress.total - ended) / 60
        return f", about {minutes:.0f} min left" if minutes >= 1 else ", less than a minute left"
