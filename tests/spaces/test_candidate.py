import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.candidate import Candidate
from spaces.thresholds import UNSOLVED, Thresholds

names = st.text("abc.012", min_size=1, max_size=8)
candidates = st.builds(
    Candidate,
    st.dictionaries(names, st.integers(1, 512), max_size=4),
    st.dictionaries(names, st.sampled_from(["fp32", "int8"]), max_size=4),
    st.builds(
        Thresholds,
        st.dictionaries(names, st.sampled_from([None, UNSOLVED, 0.0, 0.5, 0.99]), max_size=3),
        st.dictionaries(names, st.sampled_from([None, -3.5, 0.0, 4.0]), max_size=2),
        st.dictionaries(names, st.sampled_from([None, -3.5, 0.0, 4.0]), max_size=2),
        st.sampled_from([None, 0.0, 0.2]),
    ),
)


@given(candidates)
def test_json_round_trip_keeps_the_content_and_the_key(candidate: Candidate) -> None:
    again = Candidate.from_dict(json.loads(json.dumps(candidate.to_dict())))
    assert again == candidate
    assert again.key == candidate.key
    assert hash(again) == hash(candidate)


@given(candidates, candidates)
def test_the_key_tells_different_candidates_apart(one: Candidate, other: Candidate) -> None:
    assert (one.key == other.key) == (one == other)


def test_the_order_in_which_parts_are_named_does_not_matter() -> None:
    one = Candidate({"a": 8, "b": 16}, {})
    assert one.key == Candidate({"b": 16, "a": 8}, {}).key


def test_a_candidate_cannot_be_changed() -> None:
    candidate = Candidate({"a": 8}, {})
    with pytest.raises(TypeError):
        candidate.channels["a"] = 4  # type: ignore[index]


def test_files_of_before_write_what_is_off_as_the_end_of_its_range() -> None:
    written = {"exit1": 1.0, "exit2": -1.0, "skip.a": -4.0, "skip.b": 0.5, "mask.a": -4.0, "frames": 0.0}
    read = Thresholds.from_dict(written)
    assert read == Thresholds({"exit1": None, "exit2": UNSOLVED}, {"a": None, "b": 0.5}, {"a": None}, 0.0)
    assert read.to_dict() == written


@pytest.mark.parametrize("confidence", [1.0, 2.0])
def test_an_exit_that_never_answers_has_no_threshold(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"below 1, or None .*, got \{'exit1'"):
        Thresholds({"exit1": confidence})


def test_exits_are_active_with_a_threshold_and_sorted_by_depth() -> None:
    candidate = Candidate({}, {}, Thresholds({"exit10": 0.5, "exit2": 0.9, "exit1": None}))
    assert candidate.active_exits == ("exit2", "exit10")


def test_a_part_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="thresholds"):
        Candidate.from_dict({"channels": {}, "precision": {}})
