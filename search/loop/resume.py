"""How a search goes on: what earlier runs left in the journal, and what has to be put right."""

from collections.abc import Iterable, Sequence

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from evaluators.latency.slow_layers import SlowLayers
from search.results.evaluation import Evaluation
from search.results.pareto import OBJECTIVES, Version
from search.results.store import SearchFolder, StoreError
from spaces.candidate import Candidate
from spaces.joint import JointSpace


def resolved_choices(trials: Sequence[FrozenTrial], versions: Iterable[Version]) -> dict[str, Candidate]:
    """Returns what the choices of earlier trials came to once thresholds were solved, by the key of the choices.

    Timings decide with, so the same choices may come to other thresholds a second time: they are solved once.
    """
    candidates = {version.number: version.evaluation.candidate for version in versions}
    numbers = {
        trial.user_attrs["choices"]: trial.user_attrs.get("duplicate_of", trial.number)
        for trial in trials
        if "choices" in trial.user_attrs
    }
    return {key: candidates[number] for key, number in numbers.items() if number in candidates}


def is_counted(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts towards `--trials`: finished, and not cut short from outside."""
    return trial.state.is_finished() and "interrupted" not in trial.user_attrs


def put_right_running(journal: optuna.Study) -> None:
    """Gives up trials that a stopped process left running, and queues the same proposals again."""
    for trial in journal.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "evaluation" in trial.user_attrs:  # it was measured, and stopped on the way into the journal
            version = Version(trial.number, Evaluation.from_dict(trial.user_attrs["evaluation"]))
            whole = version.is_complete
            values = [version.measured[metric].value for metric in OBJECTIVES] if whole else None
            state = TrialState.COMPLETE if whole else TrialState.PRUNED
            journal.tell(trial.number, values, state)
            continue
        # A trial is told by its number, but its attributes are written through a Trial only, and to a Trial of what
        # another process asked for there is no other way than by the number that the storage gives it.
        running = Trial(journal, trial._trial_id)
        running.set_user_attr("interrupted", True)
        running.set_user_attr("reason", "interrupted")
        journal.tell(running, state=TrialState.FAIL)
        if trial.params:
            journal.enqueue_trial(trial.params, skip_if_exists=False)


def without_slow_precisions(space: JointSpace, examined: SlowLayers | None) -> JointSpace:
    """Returns the space without the precisions in which a layer was slower."""
    if examined is None:
        return space
    return space.narrowed(examined.allowed(space.precision.layers, space.precision.computed))


def check_same_network(folder: SearchFolder, then: str | None, now: str) -> None:
    """Checks that a search goes on with the network and the images that it began with.

    Raises:
        StoreError: others lie there now.
    """
    if then not in (None, now):
        raise StoreError(
            f"a search goes on with the network and the images that it began with, got others for {folder.path};"
            " give another --search, or bring the earlier ones back"
        )
