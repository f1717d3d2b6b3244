"""Starting a search from what an earlier one measured that differs in its budget alone."""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from evaluators.measurement import Measurement
from search.config.budget import Budget
from search.config.study import Study
from search.loop.resume import TAKEN
from search.results.evaluation import Evaluation
from search.results.store import (
    PROCESSOR_SECONDS,
    Baseline,
    SearchFolder,
    objectives_of,
    read_given,
    read_widths,
    store_given,
    store_widths,
)
from spaces.errors import UserError


def find_earlier(study: Study, folder: SearchFolder) -> SearchFolder | None:
    """Returns the latest search beside `folder` of the same study under another budget; None if there is none."""
    beside = sorted(folder.path.parent.glob("*/study.toml"), key=lambda file: file.stat().st_mtime, reverse=True)
    found = (SearchFolder(file.parent) for file in beside if _is_of(study, file))
    return next((search for search in found if search.path != folder.path and search.has_baseline), None)


def _is_of(study: Study, file: Path) -> bool:
    """Returns whether a study's file asks the same question within another budget."""
    try:
        other = Study.stored(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, UserError):
        return False
    no_limit = {"budget": Budget(())}
    same = (each.model_copy(update=no_limit).with_objectives(None).question_key for each in (study, other))
    return other.budget != study.budget and len(set(same)) == 1


class EarlierSearch:
    """A search of the same study under another budget.

    Args:
        folder: of it.
        environment: machine and library versions of now; what was measured with others is not taken.
    """

    def __init__(self, folder: SearchFolder, environment: Mapping[str, str]) -> None:
        self.name = folder.name
        self._journal = folder.open()
        self.budget = Study.stored(self._journal.user_attrs["study"]).budget
        self._baseline = Baseline.from_dict(self._journal.user_attrs["baseline"])
        self._is_here = self._baseline.environment == environment

    def give_network(self, journal: optuna.Study, question: str, network: str) -> bool:
        """Writes the measurements of the network as loaded, and of widths, into a new journal.

        Args:
            journal: of the new search.
            question: key of its study.
            network: fingerprint of its weights and images.

        Returns:
            Whether it did, because they are of the same network and machine.
        """
        given = read_given(self._journal)
        if not self._is_here or given is None or given.network != network:
            return False
        store_given(journal, replace(given, question=question))
        store_widths(journal, read_widths(self._journal))
        return True

    def give_versions(self, journal: optuna.Study, budget: Budget, fingerprint: str) -> int | None:
        """Writes the baseline, and the versions that a new search would measure alike, into its journal.

        Args:
            journal: of the new search.
            budget: of the new search.
            fingerprint: of its network with exits and gates, and of its images.

        Returns:
            How many versions; None if the networks differ, and nothing was written.
        """
        attributes = self._journal.user_attrs
        if attributes.get("fingerprint") != fingerprint or objectives_of(self._journal) != objectives_of(journal):
            return None
        dense = self._baseline.evaluation.measurements
        taken = [self._renewed(trial, budget, dense) for trial in self._journal.trials if _stays(trial, budget, dense)]
        there = {trial.user_attrs.get(TAKEN) for trial in journal.get_trials(deepcopy=False)}  # if it was killed here
        for trial in taken:
            if trial.user_attrs[TAKEN] not in there:
                journal.add_trial(trial)
        journal.set_user_attr("baseline", attributes["baseline"])
        return len(taken)

    def _renewed(self, trial: FrozenTrial, budget: Budget, dense: Mapping[str, Measurement]) -> FrozenTrial:
        """Returns a trial under another budget."""
        evaluation = Evaluation.from_dict(trial.user_attrs["evaluation"])
        return create_trial(
            values=trial.values,
            params=trial.params,
            distributions=trial.distributions,
            # It costs this search nothing, and what follows a search lasts in proportion to it.
            user_attrs={**trial.user_attrs, TAKEN: f"{self.name}:{trial.number}", PROCESSOR_SECONDS: 0.0},
            constraints=budget.violations(evaluation.measurements, dense),
        )


def _stays(trial: FrozenTrial, budget: Budget, dense: Mapping[str, Measurement]) -> bool:
    """Returns whether a trial's version was measured in full, and would be the same under another budget.

    Thresholds are solved for a budget. A version that leaves all exits out needs none within this one either: it is the
    most accurate that they can make it.
    """
    if trial.state != TrialState.COMPLETE or "evaluation" not in trial.user_attrs:
        return False
    evaluation = Evaluation.from_dict(trial.user_attrs["evaluation"])
    if "choices" not in trial.user_attrs:
        return True
    is_within = budget.without("accuracy").is_met(evaluation.measurements, dense)
    return is_within and not evaluation.candidate.active_exits
