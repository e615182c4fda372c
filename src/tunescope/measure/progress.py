"""What a sweep shows while it runs: a bar with the time left on a terminal, one line a point anywhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def duration_text(seconds: float) -> str:
    """`42 s`, `3 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class SweepProgress:
    """Progress over points, each of which reports its own steps. Writes to stderr only."""

    def __init__(self, num_points: int) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._num_points = num_points
        self._num_done = 0
        self._noted: set[str] = set()
        self._started_s = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=float(self._num_points), left="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)

    def start_point(self, label: str) -> None:
        self._label = label
        self._point_started_s = time.monotonic()
        self._update(0.0, "starting")

    def stage(self, name: str) -> None:
        self._update(0.5, name)

    def step(self, done: int, expected: int) -> None:
        self._update(min(done / max(expected, 1), 0.99), f"step {done}")

    def end_point(self, outcome: str) -> None:
        self._num_done += 1
        took = duration_text(time.monotonic() - self._point_started_s)
        self.note(f"[{self._num_done}/{self._num_points}] {self._label}: {outcome} ({took})")

    def _update(self, frac_of_point: float, detail: str) -> None:
        if self._bar is None or self._task is None:
            return
        completed = self._num_done + frac_of_point
        elapsed_s = time.monotonic() - self._started_s
        left = (
            f"about {duration_text(elapsed_s / completed * (self._num_points - completed))} left" if completed else ""
        )
        description = f"{self._num_done + 1}/{self._num_points} {self._label}, {detail}"
        self._bar.update(self._task, completed=completed, description=description, left=left)
