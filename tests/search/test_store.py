"""The journal survives crashes, and is never touched when it is not ours to touch."""

import optuna
import pytest
from optuna.trial import TrialState

from search.loop.resume import is_counted, requeue_running
from search.results.folders import StoreError
from search.results.store import SearchFolder, check_journal, find_search


@pytest.fixture
def folder(tmp_path):
    return SearchFolder(tmp_path / "runs" / "one")


def add_trials(stored: optuna.Study, count: int) -> None:
    for index in range(count):
        trial = stored.ask()
        trial.suggest_int("x", 0, 10)
        stored.tell(trial, [index, 1.0])


def test_a_last_line_that_a_crash_tore_off_is_dropped(folder) -> None:
    with folder.lock():
        add_trials(folder.create(), 3)
        whole = folder.journal.read_bytes()
        folder.journal.write_bytes(whole + b'{"op_code":5,"worker')
        assert check_journal(folder.journal) == len(whole)
        assert len(folder.open().trials) == 3
        assert folder.journal.read_bytes() != whole, "reading alone changes nothing"
        stored = folder.create()
        assert folder.journal.read_bytes()[: len(whole)] == whole
        add_trials(stored, 1)
    assert len(folder.open().trials) == 4


def test_a_journal_that_lost_everything_starts_again(folder) -> None:
    with folder.lock():
        folder.create()
        folder.journal.write_bytes(b'{"op_co')
        add_trials(folder.create(), 1)
    assert len(folder.open().trials) == 1


@pytest.mark.parametrize("damage", [b"not json\n", b"[1, 2]\n", b"\x00\x00\x00\n"])
def test_a_corrupt_journal_is_named_and_left_alone(folder, damage) -> None:
    with folder.lock():
        add_trials(folder.create(), 2)
        lines = folder.journal.read_bytes().splitlines(keepends=True)
        folder.journal.write_bytes(b"".join([*lines[:3], damage, *lines[3:]]))
        before = folder.journal.read_bytes()
        for use in (folder.open, folder.create):
            with pytest.raises(StoreError, match=r"line 4 of .*journal\.log"):
                use()
        assert folder.journal.read_bytes() == before


def test_json_that_is_no_journal_is_named_too(folder) -> None:
    folder.path.mkdir(parents=True)
    folder.journal.write_text('{"hello": "world"}\n')
    with pytest.raises(StoreError, match=r"journal\.log is not a journal"):
        folder.open()


def test_a_lock_that_a_killed_process_left_does_not_delay(folder) -> None:
    with folder.lock():
        add_trials(folder.create(), 1)
        leftover = folder.journal.with_name("journal.log.lock")
        leftover.symlink_to(folder.journal)
        add_trials(folder.create(), 1)
        assert not leftover.is_symlink()


def test_a_folder_that_got_no_journal_is_gone_again(tmp_path) -> None:
    folder = SearchFolder(tmp_path / "runs" / "mistyped")
    with folder.lock():
        assert folder.is_locked
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "mistyped").mkdir(parents=True)
    with folder.lock():
        pass
    assert folder.path.is_dir(), "it was there before"
    assert not folder.is_locked


def test_two_searches_in_one_folder_are_refused(folder) -> None:
    with folder.lock(), pytest.raises(StoreError, match="one process searches at a time"), folder.lock():
        pass


def test_trials_that_were_running_are_given_up_and_queued_again(folder) -> None:
    with folder.lock():
        stored = folder.create()
        add_trials(stored, 2)
        stored.ask().suggest_int("x", 0, 10)
        wanted = stored.trials[2].params
        again = folder.create()
        requeue_running(again)
        assert [trial.state for trial in again.trials[:3]] == [TrialState.COMPLETE] * 2 + [TrialState.FAIL]
        assert [is_counted(trial) for trial in again.trials] == [True, True, False, False]
        trial = again.ask()
        assert trial.suggest_int("x", 0, 10) == wanted["x"]


def test_the_latest_search_is_taken_unless_one_is_named(tmp_path) -> None:
    for name in ("first", "second"):
        folder = SearchFolder(tmp_path / name)
        with folder.lock():
            add_trials(folder.create(), 1)
    assert find_search(tmp_path, None).name == "second"
    assert find_search(tmp_path, "first").name == "first"
    SearchFolder(tmp_path / "first").open().set_user_attr("baseline", {})
    SearchFolder(tmp_path / "second").open().set_user_attr("study", {})
    assert find_search(tmp_path, None).name == "first", "the other has no trial yet"
    with pytest.raises(StoreError, match="no search in"):
        find_search(tmp_path / "empty", None)
    with pytest.raises(StoreError, match=r"journal\.log"):
        find_search(tmp_path, "third").open()


def test_a_trial_that_was_measured_before_the_crash_is_finished_from_what_was_written(folder, pipeline) -> None:
    with folder.lock():
        stored = folder.create()
        subject = pipeline.space.dense()
        seconds = {name: spent.work for name, spent in pipeline.references.time().items()}
        evaluator = pipeline.references.latency_evaluator(seconds)
        evaluation = pipeline.evaluate(subject, evaluator)
        stored.ask().set_user_attr("evaluation", evaluation.to_dict())
        requeue_running(folder.create())
        (trial,) = folder.open().trials
    assert trial.state == TrialState.COMPLETE
    assert trial.values[0] == evaluation.measurements["accuracy"].value
    assert "interrupted" not in trial.user_attrs


def test_a_folder_that_was_renamed_still_has_its_search(tmp_path) -> None:
    with SearchFolder(tmp_path / "one").lock():
        SearchFolder(tmp_path / "one").create().set_user_attr("study", {"name": "mine"})
    (tmp_path / "one").rename(tmp_path / "two")
    assert SearchFolder(tmp_path / "two").open().user_attrs["study"] == {"name": "mine"}
