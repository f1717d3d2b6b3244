"""Progress on the terminal while a command runs."""

import time
from collections.abc import Callable, Sequence

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from evaluators.measurement import METRICS
from search.config.budget import Budget
from search.config.objectives import Objectives
from search.config.units import percent, quantity
from search.results.evaluation import Evaluation
from search.results.pareto import Version, choose, feasible, front_within

_PLAIN_EVERY = 10
"""Trials per line of output without a terminal."""
_PLAIN_EVERY_S = 60.0
"""Seconds between lines on steps that were announced before, at least."""
_BAR = 40


class Display:
    """A live view on a terminal, or occasional lines elsewhere.

    Nothing is drawn while a candidate is timed; the view is refreshed between trials only.

    Args:
        console: where to write.
        quiet: whether nothing is written but warnings.
        clock: returns seconds.
    """

    def __init__(self, console: Console, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._quiet, self._clock = quiet, clock
        self._is_live = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._lines: list[str] = []
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._announced: set[str] = set()
        self._last_line_at = clock()

    def __enter__(self) -> "Display":
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def warn(self, text: str) -> None:
        """Writes a permanent line, even if quiet."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def say(self, text: str) -> None:
        """Writes a permanent line, unless quiet."""
        if not self._quiet:
            self.warn(text)

    def step(self, step: str, done: int, total: int) -> None:
        """Shows the progress of a long step.

        Without a live view, its beginning and end are written once; a repeated step, such as the training of each
        version, is written from time to time.
        """
        if self._is_live:
            self._show(step, done, total)
        elif self._is_worth_a_line(step, done, total):
            self._last_line_at = self._clock()
            self.say(f"{step}: {done}/{total}")

    def _is_worth_a_line(self, step: str, done: int, total: int) -> bool:
        begun, ended = f"{step} begun", f"{step} ended"
        event = {0: begun, total: ended}.get(done)
        if event is not None and event not in self._announced and ended not in self._announced:
            self._announced.add(event)
            return True
        return self._clock() - self._last_line_at >= _PLAIN_EVERY_S

    def show(self, lines: Sequence[str], title: str, done: int, total: int) -> None:
        """Shows the state of the search: some lines and a progress bar."""
        if self._is_live:
            self._lines = list(lines)
            self._show(title, done, total)
        elif done % _PLAIN_EVERY == 0 or done == total:
            self._last_line_at = self._clock()
            self.say(f"{title} {done}/{total}: {'; '.join(lines)}")

    def _show(self, title: str, done: int, total: int) -> None:
        lines = [*self._lines, *([bar(title, done, total, self.console.width)] if done < total else [])]
        # Lines are truncated, because a wrapped line would break the cursor's position.
        view = Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
        self._live.update(view, refresh=True)


def bar(title: str, done: int, total: int, width: int) -> str:
    """Returns a progress bar of at most `width` characters, with title and count."""
    count = f"{done}/{total}"
    room = min(width - len(title) - len(count) - 3, _BAR)
    if room < 5:
        return f"{title} {count}"
    full = room * done // max(total, 1)
    return f"{title} {'#' * full}{'.' * (room - full)} {count}"


class SearchView:
    """Updates a display with the trials of a search.

    Args:
        display: to draw on.
        versions: measured by earlier runs of the search.
        budget: of the search.
        objectives: of the search.
        dense: the dense network.
        done: number of trials finished by earlier runs.
        total: number of trials of the search.
        simple: versions measured before the first trial.
    """

    def __init__(
        self,
        display: Display,
        versions: Sequence[Version],
        budget: Budget,
        objectives: Objectives,
        dense: Version,
        done: int,
        total: int,
        simple: Sequence[Version] = (),
    ) -> None:
        self._display = display
        self._versions = list(versions)
        self._budget = budget
        self._objectives = objectives
        self._dense = dense
        self._simple = simple
        self._done = done
        self._total = total
        self._failed = 0
        self._begin, self._first = time.monotonic(), done
        self._draw()

    def trial_done(self, trial: FrozenTrial, seconds: float) -> None:  # noqa: ARG002  the observers' signature
        """Adds a finished trial to the view."""
        self._done += 1
        self._failed += trial.state == TrialState.FAIL
        if "evaluation" in trial.user_attrs:
            self._versions.append(Version(trial.number, Evaluation.from_dict(trial.user_attrs["evaluation"])))
        if trial.state == TrialState.FAIL and self._failed <= 3:
            self._display.warn(f"trial {trial.number} failed: {trial.user_attrs.get('reason', 'no reason given')}")
        self._draw()

    def _draw(self) -> None:
        good = feasible([*self._simple, *self._versions], self._budget, self._dense.measured)
        dense = self._dense.measured
        front = front_within(self._versions, self._simple, self._budget, dense, self._objectives).versions
        counts = f"{len(front)} on the front, {len(good)} within the budget, {self._failed} failed"
        lines = [f"{counts}{self._time_left()}"]
        if front:
            best, cost = choose(front, "accuracy", self._objectives)[0].measured, METRICS[self._objectives[1]]
            lines.append(
                f"best: accuracy {percent(best['accuracy'].value)}"
                f" (dense {percent(dense['accuracy'].value)}),"
                f" {cost.title} {quantity(best[cost.name].value, cost.unit)}"
                f" (dense {quantity(dense[cost.name].value, cost.unit)})"
            )
        self._display.show(lines, "trials", self._done, self._total)

    def _time_left(self) -> str:
        done = self._done - self._first
        if done < 1:
            return ""
        left = (time.monotonic() - self._begin) / done * max(self._total - self._done, 0)
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"
