"""What the screen shows while a search runs."""

import time
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from search.budget import Budget
from search.evaluation import Evaluation
from search.front import Version, choose, feasible, hypervolume, pareto
from search.text import milliseconds, percent

_PLAIN_EVERY = 10
"""Without a terminal, a line after so many trials."""


class Display:
    """A live view on a terminal, now and then a line elsewhere.

    Nothing is drawn while a candidate is timed: the view is refreshed between trials only.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, auto_refresh=False
        )
        self._task = self._progress.add_task("", visible=False)
        self._lines: list[Text] = []
        self._live = Live(self._view(), console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _view(self) -> Group:
        return Group(*self._lines, self._progress)

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def step(self, step: str, done: int, total: int) -> None:
        """Shows how far a long step is."""
        if self.console.is_terminal:
            self._show(step, done, total)
        elif done in (0, total):
            self.say(f"{step}: {done}/{total}")

    def show(self, lines: Sequence[str], title: str, done: int, total: int) -> None:
        """Shows the search as it stands: some lines and a bar."""
        if self.console.is_terminal:
            self._lines = [Text(line) for line in lines]
            self._show(title, done, total)
        elif done % _PLAIN_EVERY == 0 or done == total:
            self.say(f"{title} {done}/{total}: {'; '.join(lines)}")

    def _show(self, title: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=title, completed=done, total=total, visible=done < total)
        self._live.update(self._view(), refresh=True)


class SearchView:
    """Keeps a display up to date with the trials of a search.

    Args:
        display: what draws.
        versions: what earlier runs of the search measured.
        budget: of the search.
        dense: the dense network.
        done: trials that earlier runs finished.
        total: when the search ends.
    """

    def __init__(
        self, display: Display, versions: Sequence[Version], budget: Budget, dense: Version, done: int, total: int
    ) -> None:
        self._display = display
        self._versions = list(versions)
        self._budget = budget
        self._dense = dense
        self._done = done
        self._total = total
        self._failed = 0
        self._begin, self._first = time.monotonic(), done
        self._draw()

    def trial_done(self, trial: FrozenTrial, seconds: float) -> None:  # noqa: ARG002  the observers' signature
        """Takes note of a finished trial."""
        self._done += 1
        self._failed += trial.state == TrialState.FAIL
        if "evaluation" in trial.user_attrs:
            self._versions.append(Version(trial.number, Evaluation.from_dict(trial.user_attrs["evaluation"])))
        if trial.state == TrialState.FAIL and self._failed <= 3:
            self._display.say(f"trial {trial.number} failed: {trial.user_attrs.get('reason', 'no reason given')}")
        self._draw()

    def _draw(self) -> None:
        good = feasible(self._versions, self._budget, self._dense.measured)
        front = pareto(good)
        lines = [f"{len(front)} on the front, {len(good)} within {self._budget}, {self._failed} failed"]
        if front:
            best = choose(front, "accuracy")[0].measured
            lines.append(
                f"best within budget: accuracy {percent(best['accuracy'].value)}"
                f" (dense {percent(self._dense.measured['accuracy'].value)}),"
                f" latency {milliseconds(best['latency'].value)}"
                f" (dense {milliseconds(self._dense.measured['latency'].value)})"
            )
        share = hypervolume(front, self._budget, self._dense.measured)
        lines.append(f"hypervolume {share:.1%}{self._time_left()}")
        self._display.show(lines, "trials", self._done, self._total)

    def _time_left(self) -> str:
        done = self._done - self._first
        if done < 1:
            return ""
        left = (time.monotonic() - self._begin) / done * max(self._total - self._done, 0)
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
