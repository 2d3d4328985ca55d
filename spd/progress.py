"""What the runner is doing and how far it is: a bar on a terminal, now and then a line anywhere else."""

import logging
import os
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0
"""Where output is a file or a pipe, a step that lasts says how far it is this often."""


class Display:
    """One point's progress; use as a context.

    Args:
        title: shown before every step, for instance "point 3/7, drop 0.5".
        console: by default standard error, so that standard output holds results only.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._step, self._last = "", 0.0
        self._first: tuple[float, int] | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self.console.print(f"{self.title}: {sentence}", markup=False)

    def step(self, text: str) -> None:
        """A new step begins; how long it is, is not known yet."""
        self._step, self._last, self._first = text, time.monotonic(), None
        # Not reset(): that keeps the length of the step before.
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(f"{self.title}: {text}", total=None)
        if not self.console.is_terminal:
            self.say(text)

    def __call__(self, done: int, total: int) -> None:
        """The step is at `done` of `total`: the `on_progress` of everything that takes long."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        # What came before the first report is not counted: ranks start and compile, answers that are kept are read.
        began, had = self._first = self._first or (now, done)
        if not self.console.is_terminal and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            rate = (done - had) / (now - began) if done > had else 0
            left = timedelta(seconds=round((total - done) / rate)) if rate else "unknown"
            self.say(f"{self._step} {done}/{total}, time left {left}")


def quiet() -> None:
    """Sends what lm-eval, transformers, datasets and their bars say to the log file alone. Before they are imported."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.captureWarnings(True)
