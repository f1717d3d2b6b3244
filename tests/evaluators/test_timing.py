"""The timing loop against scripted clocks, and once against the real one."""

import time

import numpy as np
import pytest

from evaluators.runtimes.paired_timing import Clock, PairedTiming, TimingProtocol, turns_of
from evaluators.runtimes.paired_timing import time_pair as time_turns


def time_pair(candidate, weights, reference, protocol: TimingProtocol, clock: Clock) -> PairedTiming:
    return time_turns(turns_of(candidate, reference, protocol, clock), weights, protocol, clock.wall)


class Machine:
    """A machine whose speed is scripted: each call costs work, and work costs more time while it is slow."""

    def __init__(self, speed) -> None:
        self.now = 0.0
        self.speed = speed
        self.log: list[str] = []

    def call(self, name: str, work: float):
        def run() -> None:
            self.log.append(name)
            self.now += work * self.speed(self.now)

        return run

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.now)


PROTOCOL = TimingProtocol(limit_s=1e9)


def test_the_ratio_is_that_of_the_work() -> None:
    machine = Machine(lambda _: 1.0)
    found = time_pair([machine.call("c", 3.0)], [1], machine.call("r", 2.0), PROTOCOL, machine.clock)
    assert found.ratio == pytest.approx(1.5)
    assert found.half_width == pytest.approx(0)
    assert found.work_s == pytest.approx(3.0)
    assert found.wall_percentile(50) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "speed",
    [
        lambda now: 1.0 + now / 500,  # slows down all the time
        lambda now: 1.3 if int(now / 37) % 2 else 1.0,  # switches between two speeds
    ],
)
def test_a_drifting_machine_does_not_move_the_ratio(speed) -> None:
    machine = Machine(speed)
    found = time_pair([machine.call("c", 3.0)], [1], machine.call("r", 2.0), PROTOCOL, machine.clock)
    assert found.ratio == pytest.approx(1.5, rel=0.02)


def test_the_two_sides_take_turns_and_change_who_begins() -> None:
    machine = Machine(lambda _: 1.0)
    time_pair(
        [machine.call("c", 1.0)],
        [1],
        machine.call("r", 1.0),
        TimingProtocol(warmups=0, turns=4, limit_s=1e9),
        machine.clock,
    )
    assert "".join(machine.log) == "ccrr" + "rrcc" + "ccrr" + "rrcc"


def test_bursts_last_until_the_caches_are_in_the_state_of_steady_use() -> None:
    machine = Machine(lambda _: 1.0)
    protocol = TimingProtocol(warmups=3, turns=2, burst_s=8.0, limit_s=1e9)
    time_pair([machine.call("c", 2.0)], [1], machine.call("r", 1.0), protocol, machine.clock)
    assert "".join(machine.log) == "rrr" + "ccc" + "ccccc" + "r" * 9 + "r" * 9 + "ccccc"


def test_what_interrupts_a_burst_now_and_then_counts_as_it_does_in_a_loop() -> None:
    machine = Machine(lambda _: 1.0)
    costs = iter([1.0, 1.0, 1.0, 3.0] * 1000)

    def interrupted() -> None:
        machine.now += next(costs)

    protocol = TimingProtocol(warmups=0, burst=9, limit_s=1e9)
    found = time_pair([interrupted], [1], machine.call("r", 1.0), protocol, machine.clock)
    assert found.ratio == pytest.approx(1.5, rel=0.05)


def test_what_a_caller_waits_beyond_the_work_stands_beside_it() -> None:
    """A GPU's events see the work; the host's part of a call shows on the wall only."""
    work, host = 0.0, 0.0

    def call(seconds: float, waits: float):
        def run() -> None:
            nonlocal work, host
            work, host = work + seconds, host + waits

        return run

    clock = Clock(lambda: work, lambda: work + host)
    calls = [call(1.0, 0.25), call(3.0, 0.5)]
    found = time_pair(calls, [3, 1], call(2.0, 7.0), PROTOCOL, clock)
    assert found.ratio == pytest.approx((3 * 0.5 + 1.5) / 4)
    assert found.waits_s == pytest.approx((0.25, 0.5))
    assert found.wait_s == pytest.approx((3 * 0.25 + 0.5) / 4)
    assert found.typical_wall_s == pytest.approx((3 * 1.25 + 3.5) / 4)


def test_the_first_call_of_a_burst_is_not_counted() -> None:
    machine = Machine(lambda _: 1.0)
    costs = iter([5.0, 1.0] * 1000)

    def cold_then_warm() -> None:
        machine.now += next(costs)

    found = time_pair(
        [cold_then_warm], [1], machine.call("r", 1.0), TimingProtocol(warmups=0, limit_s=1e9), machine.clock
    )
    assert found.ratio == pytest.approx(1.0)


def test_inputs_count_by_weight_and_a_weightless_one_is_only_reported() -> None:
    machine = Machine(lambda _: 1.0)
    calls = [machine.call("a", 1.0), machine.call("b", 3.0), machine.call("worst", 9.0)]
    found = time_pair(calls, [3, 1, 0], machine.call("r", 1.0), PROTOCOL, machine.clock)
    assert found.ratio == pytest.approx(1.5)
    assert found.per_input == pytest.approx((1.0, 3.0, 9.0))
    assert found.wall_percentile(50) == pytest.approx(1.0)
    assert found.wall_percentile(99) == pytest.approx(3.0)
    assert found.wall_cv == pytest.approx(np.sqrt(0.75) / 1.5)


def test_it_stops_at_its_time_limit_after_two_turns_of_each_input() -> None:
    machine = Machine(lambda _: 1.0)
    limit = TimingProtocol(warmups=0, limit_s=0.1)
    time_pair([machine.call("a", 1.0), machine.call("b", 1.0)], [1, 1], machine.call("r", 1.0), limit, machine.clock)
    assert (
        machine.log.count("a") + machine.log.count("b") == 7
    )  # two turns of one of each and one before, one to warm up
    assert machine.log.count("r") == 4


def test_inputs_follow_each_other_as_often_as_they_occur() -> None:
    machine = Machine(lambda _: 1.0)
    calls = [machine.call(name, 1.0) for name in ("often", "seldom", "never")]
    take_turn = turns_of(calls, machine.call("r", 1.0), TimingProtocol(warmups=0, burst=41), machine.clock, (3, 1, 0))
    orders = []
    for _ in range(10):
        machine.log.clear()
        take_turn(True)
        assert machine.log[:11] == ["never"] * 11, "what never occurs is timed alone"
        orders.append(tuple(machine.log[12:52]))
        assert [orders[-1].count(name) for name in ("often", "seldom")] == [30, 10]
        assert machine.log[52:] == ["r"] * 41
    assert len(set(orders)) == 10, "the order is another one each time"


def test_what_an_input_costs_after_others_is_what_it_costs_in_succession() -> None:
    machine, last = Machine(lambda _: 1.0), ["easy"]

    def call(name: str, work: float, cold: float):
        def run() -> None:
            machine.now += work + (cold if last[0] != name else 0.0)
            last[0] = name

        return run

    calls = [call("easy", 1.0, 0.0), call("hard", 4.0, 2.0)]
    protocol = TimingProtocol(burst=81, turns=20, limit_s=1e9, calls=10**6)
    turns = turns_of(calls, machine.call("r", 1.0), protocol, machine.clock, (1, 1))
    found = time_turns(turns, [1, 1], protocol, machine.clock.wall)
    assert found.per_input == pytest.approx((1.0, 5.0), rel=0.05), "half of what is hard comes after what is easy"
    assert found.ratio == pytest.approx(3.0, rel=0.03)


def test_it_goes_on_until_the_interval_is_narrow() -> None:
    rng = np.random.default_rng(0)

    def calls_with(noise: float) -> int:
        machine = Machine(lambda _: 1.0 + noise * rng.random())
        time_pair([machine.call("c", 1.0)], [1], machine.call("r", 1.0), PROTOCOL, machine.clock)
        return machine.log.count("c")

    assert calls_with(0.0) < calls_with(0.2) <= PROTOCOL.calls + PROTOCOL.warmups + PROTOCOL.burst


def test_inputs_without_a_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        time_pair([lambda: None], [0], lambda: None, PROTOCOL, Clock.for_threads(1))


def test_a_real_loop_twice_as_long_takes_twice_the_time() -> None:
    def work(count: int):
        def run() -> None:
            end = 0
            for index in range(count):
                end += index

        return run

    found = time_pair([work(40_000)], [1], work(20_000), TimingProtocol(limit_s=1.0), Clock.for_threads(1))
    assert 1.6 < found.ratio < 2.4
    assert found.wall_percentile(50) < time.get_clock_info("perf_counter").resolution + 1.0
