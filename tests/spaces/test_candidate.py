import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.candidate import Candidate

names = st.text("abc.012", min_size=1, max_size=8)
candidates = st.builds(
    Candidate,
    st.dictionaries(names, st.integers(1, 512), max_size=4),
    st.dictionaries(names, st.sampled_from(["fp32", "int8"]), max_size=4),
    st.dictionaries(names, st.integers(50, 100).map(lambda value: value / 100), max_size=3),
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
    one = Candidate({"a": 8, "b": 16}, {}, {})
    assert one.key == Candidate({"b": 16, "a": 8}, {}, {}).key


def test_a_candidate_cannot_be_changed() -> None:
    candidate = Candidate({"a": 8}, {}, {})
    with pytest.raises(TypeError):
        candidate.channels["a"] = 4  # type: ignore[index]


def test_exits_are_active_below_one_and_sorted_by_depth() -> None:
    candidate = Candidate({}, {}, {"exit10": 0.5, "exit2": 0.9, "exit1": 1.0})
    assert candidate.active_exits == ("exit2", "exit10")


def test_a_part_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="thresholds"):
        Candidate.from_dict({"channels": {}, "precision": {}})
