"""Resuming a search: reads results of earlier runs from the journal, and repairs interrupted trials."""

from collections.abc import Iterable, Sequence

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from evaluators.latency.slow_layers import SlowLayers
from search.results.evaluation import Evaluation
from search.results.folders import StoreError
from search.results.pareto import Version
from search.results.store import SearchFolder, objectives_of
from spaces.candidate import Candidate
from spaces.joint import JointSpace

TAKEN = "taken_from"
"""Attribute of a trial that an earlier search ran, under another budget: the search and the number there."""


def resolved_choices(trials: Sequence[FrozenTrial], versions: Iterable[Version]) -> dict[str, Candidate]:
    """Returns the candidates with solved thresholds of earlier trials, by the key of the unsolved choices.

    Solved thresholds depend on timings, so they are solved only once for the same choices.
    """
    candidates = {version.number: version.evaluation.candidate for version in versions}
    numbers = {
        trial.user_attrs["choices"]: trial.user_attrs.get("duplicate_of", trial.number)
        for trial in trials
        if "choices" in trial.user_attrs
    }
    return {key: candidates[number] for key, number in numbers.items() if number in candidates}


def is_counted(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts towards `--trials`: it is finished, not interrupted, and of this search."""
    return trial.state.is_finished() and not {"interrupted", TAKEN} & trial.user_attrs.keys()


def requeue_running(journal: optuna.Study) -> None:
    """Fails trials that a stopped process left running and queues them again; measured ones are completed."""
    for trial in journal.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "evaluation" in trial.user_attrs:  # it was measured, but the process stopped before it was told
            version = Version(trial.number, Evaluation.from_dict(trial.user_attrs["evaluation"]))
            is_complete = version.is_complete
            values = version.values(objectives_of(journal)) if is_complete else None
            state = TrialState.COMPLETE if is_complete else TrialState.PRUNED
            journal.tell(trial.number, values, state)
            continue
        # Attributes can only be set through a Trial, and a Trial of another process can only be made by its storage id.
        running = Trial(journal, trial._trial_id)
        running.set_user_attr("interrupted", True)
        running.set_user_attr("reason", "interrupted")
        journal.tell(running, state=TrialState.FAIL)
        if trial.params:
            journal.enqueue_trial(trial.params, skip_if_exists=False)


def without_slow_precisions(space: JointSpace, slow_layers: SlowLayers | None) -> JointSpace:
    """Returns the space without lower precisions of layers that are slower in them."""
    if slow_layers is None:
        return space
    return space.narrowed(slow_layers.allowed(space.precision.layers, space.precision.computed))


def check_same_network(folder: SearchFolder, then: str | None, now: str) -> None:
    """Checks that a search is resumed with the network and the images that it began with.

    Args:
        folder: of the search.
        then: the fingerprint in the journal; None in a new one.
        now: the fingerprint of the pipeline.

    Raises:
        StoreError: they differ.
    """
    if then not in (None, now):
        raise StoreError(
            f"a search goes on with the network and the images that it began with, got others for {folder.path};"
            " give another --search, or bring the earlier ones back"
        )
