"""What is shown while a command works: live, narrow, piped, quiet."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from search.config.budget import Budget
from search.report.display import Display, SearchView, bar
from search.report.output import Output
from tests.helpers.searches import version


class Clock:
    """Tells the seconds that a test lets pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def piped() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def written(display: Display) -> list[str]:
    return display.console.file.getvalue().splitlines()


def test_a_step_that_comes_again_and_again_is_told_once() -> None:
    clock = Clock()
    display = Display(piped(), clock=clock)
    for _ in range(50):
        for done in (0, 30, 100):
            display.step("Fine-tuning a version", done, 100)
            clock.now += 0.1
    assert written(display) == ["Fine-tuning a version: 0/100", "Fine-tuning a version: 100/100"]


def test_a_long_step_is_mentioned_every_minute() -> None:
    clock = Clock()
    display = Display(piped(), clock=clock)
    for done in range(0, 101):
        display.step("Training the dense network, once", done, 100)
        clock.now += 10
    told = [int(re.search(r"(\d+)/100", line)[1]) for line in written(display)]
    assert told[0] == 0
    assert told[-1] == 100
    assert 14 <= len(told) <= 20


def test_trials_are_told_in_tens() -> None:
    display = Display(piped(), clock=Clock())
    for done in range(26):
        display.show(["2 on the front"], "trials", done, 25)
    assert [line.split(":")[0] for line in written(display)] == [
        "trials 0/25",
        "trials 10/25",
        "trials 20/25",
        "trials 25/25",
    ]


def test_what_is_asked_for_alone_has_standard_output_for_itself(capsys) -> None:
    for output in (Output(quiet=True), Output(as_json=True)):
        Display(output.progress_console()).warn("Careful: this machine is noisy.")
        assert capsys.readouterr() == ("", "Careful: this machine is noisy.\n")
    Output(quiet=True).console().print("the result")
    assert capsys.readouterr() == ("the result\n", "")


def test_quiet_leaves_warnings() -> None:
    with Display(piped(), quiet=True) as display:
        display.say("Measuring...")
        display.step("Training", 0, 10)
        display.show(["2 on the front"], "trials", 10, 10)
        display.warn("Careful: this machine is noisy.")
    assert written(display) == ["Careful: this machine is noisy."]


@pytest.mark.parametrize("width", [12, 40, 200])
def test_a_live_view_never_wraps(width) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=20, legacy_windows=False)
    with Display(console) as display:
        display.show(["best within budget: accuracy 99.43%, latency 3.18 ms" * 3] * 2, "trials", 3, 10)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert lines
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("cost", ["latency", "flops", "params", "size"])
def test_the_state_of_a_search_fits_eighty_columns(cost) -> None:
    dense = version(-1, 1.0, 12.345, 987.6e9)
    budget = Budget.parse(["latency<100.5%,accuracy_drop<12.5%,flops<100.5%,params<100.5%,size<100.5%"])
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=20, legacy_windows=False)
    with Display(console) as display:
        SearchView(display, [dense] * 99, budget, ("accuracy", cost), dense, 990, 1000, [dense])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "best: accuracy 100.00%" in text
    assert "within the budget" in text
    assert "…" not in text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Display(console, clock=Clock()) as display:
        display.step("Training", 0, 10)
    assert written(display) == ["Training: 0/10"]


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 200))
def test_a_bar_fits_where_anything_does(done, total, width) -> None:
    line = bar("trials", min(done, total), total, width)
    assert len(line) <= max(width, len(f"trials {min(done, total)}/{total}"))
    assert line.count("#") == 0 or line.count("#") + line.count(".") <= 40
