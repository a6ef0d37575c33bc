"""Progress of a verb, on standard error: lines with the time of day; on a terminal a bar for a step with an end."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from scaling_ray.pace import Step

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def say(line: str) -> None:
    """A line of progress. A step that has an end is one bar until it has ended, where somebody looks on."""
    if isinstance(line, Step) and sys.stderr.isatty() and line.done < line.total:
        _BAR.show(line)
        return
    _BAR.close()
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def close_bar() -> None:
    """Take a bar away that a step left unfinished."""
    _BAR.close()


class _Bar:
    """The bar of the step of the moment."""

    def __init__(self) -> None:
        self._shown: tuple[Progress, TaskID, str] | None = None

    def show(self, step: Step) -> None:
        if self._shown is None or self._shown[2] != step.verb:
            self.close()
            self._shown = self._begun(step)
        progress, task, _ = self._shown
        progress.update(task, completed=step.done)

    def _begun(self, step: Step) -> tuple[Progress, TaskID, str]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(step.unit),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(file=sys.stderr),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=600.0,
        )
        progress.start()
        return progress, progress.add_task(step.verb, total=step.total), step.verb

    def close(self) -> None:
        if self._shown is not None:
            self._shown[0].stop()
            self._shown = None


_BAR = _Bar()
