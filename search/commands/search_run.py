"""Runs a search: prepares the network, measures the baselines, runs the trials, recovers the front."""

from dataclasses import dataclass, replace

import optuna

from evaluators.runtimes.base import Runtime
from search.config.environment import environment
from search.config.objectives import together
from search.config.overrides import Ending
from search.config.study import Study
from search.config.units import milliseconds, percent
from search.loop.baseline import measure_baseline
from search.loop.coordinator import Outcome, build_coordinator
from search.loop.front_recovery import recover_front
from search.loop.greedy_widths import greedy_seeds
from search.loop.other_budget import EarlierSearch, find_earlier
from search.loop.resume import check_same_network, is_counted, requeue_running
from search.pipeline.chance import check_better_than_chance, is_near_chance
from search.pipeline.channel_steps import Widths, measured_widths
from search.pipeline.given_network import GivenNetwork
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.pipeline.search_space import space_line
from search.pipeline.sensitivity_profiler import Profiler
from search.report.caveats import NOISY_MACHINE, WIDE
from search.report.describe import simple_lines, slow_layers_line
from search.report.display import Display, SearchView
from search.report.overview import write_profile
from search.results.simple_versions import GivenMeasurements
from search.results.store import (
    Baseline,
    SearchFolder,
    StoredSearch,
    read_given,
    read_widths,
    store_given,
    store_sampler,
    store_widths,
)
from search.tracking.mirror import Follower
from search.tracking.store import Tracking, remember, remembered

_AS_SEARCHED = "# As it was searched: every key, and paths that hold from any folder.\n"


@dataclass(frozen=True)
class SearchRun:
    """One run of a search, new or resumed.

    Args:
        folder: of the search.
        study: what to search.
        ending: when it ends.
        sampler: name of the sampler.
        seed: of the sampler.
        display: progress on the terminal.
        runtime: of the study's target.
        download: whether missing weights and images may be downloaded.
        tracking_uri: of MLflow; by default a database beside the searches.
    """

    folder: SearchFolder
    study: Study
    ending: Ending
    sampler: str
    seed: int
    display: Display
    runtime: Runtime
    download: bool = False
    tracking_uri: str | None = None

    def run(self) -> int:
        """Runs it until it ends; returns the exit code."""
        self.display.say(
            f"Searching study {self.study.name} within {self.study.budget} on {self.study.target.runtime} for"
            f" {together(self.study.objectives)}."
        )
        with self.folder.lock():
            given = GivenNetwork(self.study, self.display.step, self.runtime, self.display.say, self.download)
            if not self.folder.has_baseline:
                check_better_than_chance(given)
            # Not before, so that a network that cannot be had leaves nothing behind.
            journal = self.folder.create(self.study.objectives)
            earlier = None if "baseline" in journal.user_attrs else self._earlier(journal, given)
            simple = None if "baseline" in journal.user_attrs else self._measure_given(journal, given)
            pipeline = self._build(journal, given, earlier)
            if "baseline" not in journal.user_attrs:
                self._measure_baseline(journal, pipeline, simple, earlier)
            outcome = self._run_trials(journal, pipeline)
        self._say_end(outcome)
        return outcome.code

    @property
    def _trials(self) -> int:
        return self.ending.trials or self.study.search.trials

    def _earlier(self, journal: optuna.Study, given: GivenNetwork) -> EarlierSearch | None:
        """Returns a search that differs in its budget alone, whose measurements of the network are taken over."""
        folder = find_earlier(self.study, self.folder)
        if folder is None:
            return None
        earlier = EarlierSearch(folder, environment(self.runtime.device(), self.runtime.state()))
        self.display.say(
            f"Another budget is a new search, from trial 0: {earlier.name} searched the same within {earlier.budget}."
        )
        return earlier if earlier.give_network(journal, self.study.question_key, given.fingerprint) else None

    def _measure_given(self, journal: optuna.Study, given: GivenNetwork) -> GivenMeasurements:
        """Returns the measurements of the network as loaded in each precision, made now or in an earlier run.

        They are measured and shown before exits, gates or shared weights are trained.
        """
        simple = read_given(journal)
        if simple is None or (simple.question, simple.network) != (self.study.question_key, given.fingerprint):
            simple = given.measure(self.display.step)
            store_given(journal, simple)
        for line in simple_lines(simple):
            self.display.say(line)
        return simple

    def _build(self, journal: optuna.Study, given: GivenNetwork, earlier: EarlierSearch | None) -> CompressionPipeline:
        """Returns the pipeline, and shows the exits, the groups, the recovery and unsupported options."""
        display = self.display
        is_known = "baseline" in journal.user_attrs or earlier is not None
        # None are known if an earlier version began the search, which keeps its space.
        widths = read_widths(journal) if is_known else self._measured_widths(given)
        pipeline = build_pipeline(self.study, display.step, self.runtime, display.say, self.download, given, widths)
        display.say(f"{pipeline.exit_places} {pipeline.groups}")
        display.say(space_line(pipeline.space))
        check_same_network(self.folder, journal.user_attrs.get("fingerprint"), pipeline.fingerprint)
        requeue_running(journal)
        effort = f"Recovery of pruned versions: {pipeline.compressor.recovery.effort}."
        none = "No version loses channels or weights, so none is recovered."
        display.say(effort if pipeline.compressor.may_be_needed else none)
        for remark in pipeline.remarks:
            display.say(f"Note: {remark}.")
        return pipeline

    def _measured_widths(self, given: GivenNetwork) -> Widths:
        return measured_widths(given.study, self.runtime, given.target, self.display.step, self.display.say)

    def _measure_baseline(
        self,
        journal: optuna.Study,
        pipeline: CompressionPipeline,
        simple: GivenMeasurements | None,
        earlier: EarlierSearch | None,
    ) -> None:
        """Writes the study and the baselines into the journal: those of an earlier search, or measured now."""
        (self.folder.path / "study.toml").write_text(_AS_SEARCHED + self.study.to_toml(), encoding="utf-8")
        pipeline.given.loaded.write(self.folder.path)
        journal.set_user_attr("study", self.study.model_dump(mode="json"))
        journal.set_user_attr("fingerprint", pipeline.fingerprint)
        journal.set_user_attr("structure", pipeline.structure())
        store_widths(journal, pipeline.widths)
        taken = earlier.give_versions(journal, self.study.budget, pipeline.fingerprint) if earlier else None
        if earlier and taken is not None:
            self.display.say(
                f"What {earlier.name} measured of the network counts, and so do {taken} of its versions, which would be"
                " the same within this budget."
            )
            return
        self.display.say("Measuring the dense network...")
        baseline = measure_baseline(pipeline, simple, self._trials, self.ending.timeout_s, self.display.step)
        journal.set_user_attr("baseline", baseline.to_dict())

    def _run_trials(self, journal: optuna.Study, pipeline: CompressionPipeline) -> Outcome:
        """Runs the trials, recovers the front if the study asks for it, and mirrors everything into MLflow."""
        store_sampler(journal, self.sampler)
        tracking = Tracking.of(self.folder.path.parent, self.tracking_uri, remembered(journal))
        remember(journal, tracking, self.folder.path.parent)
        search, display = StoredSearch.read(self.folder), self.display
        _say_baseline(search.baseline, pipeline.data.classes, self.study.target.threads, display)
        mirror = Follower(tracking, search, display.warn)
        mirror.begin()
        done = sum(is_counted(trial) for trial in search.trials)
        if done:
            display.say(f"Going on with search {self.folder.name}: {done} trials are there")
        baselines = search.baseline.versions_to_beat
        view = SearchView(
            display, search.versions, search.budget, search.objectives, baselines[0], done, self._trials, baselines
        )
        seeds = (
            greedy_seeds(pipeline, display.step, display.say, self.folder.path) if self.study.search.warm_start else []
        )
        coordinator = build_coordinator(
            pipeline, journal, search.baseline, self.sampler, self.seed, [mirror, view], seeds
        )
        outcome = coordinator.run(self._trials, self.ending.timeout_s, self.ending.patience)
        if outcome.code == 0:
            outcome = _recover(pipeline, journal, search.baseline, outcome, display)
        if profile := Profiler(pipeline).known:
            write_profile(self.folder.path, profile)
        mirror.finish(StoredSearch.read(self.folder))
        return outcome

    def _say_end(self, outcome: Outcome) -> None:
        self.display.say(f"Ended: {outcome.reason}.")
        for remark in [*outcome.remarks, *self.runtime.remarks()]:
            self.display.say(f"Note: {remark}.")


def _recover(
    pipeline: CompressionPipeline, journal: optuna.Study, baseline: Baseline, outcome: Outcome, display: Display
) -> Outcome:
    """Recovers the front in full if the study asks for it; returns the outcome of the search with that."""
    try:
        done = recover_front(pipeline, journal, baseline, display.say)
    except KeyboardInterrupt:
        return replace(outcome, reason="interrupted", code=130)
    if done:
        return replace(outcome, reason=f"{outcome.reason}, and the front was recovered in full, in {done} trainings")
    return outcome


def _say_baseline(baseline: Baseline, classes: int, threads: int, display: Display) -> None:
    measured = baseline.evaluation.measurements
    display.say(
        f"Dense network: {milliseconds(measured['latency'].value)} per batch on {measured['latency'].target},"
        f" accuracy {percent(measured['accuracy'].value)}."
    )
    if not all(each.is_own for each in baseline.simple):
        display.say("That is with what was trained for it; what was given has to be beaten as well:")
        for line in baseline.versions_to_beat[1:]:
            latency, accuracy = line.measured["latency"].value, line.measured["accuracy"].value
            display.say(f"  {line.title}  {milliseconds(latency)}  accuracy {percent(accuracy)}")
    if is_near_chance(measured["accuracy"].value, classes):  # which is said of what was given before it is trained
        display.warn(f"CAREFUL: what was trained made it hardly better than guessing among {classes} classes.")
    if baseline.slow_layers is not None:
        display.say(slow_layers_line(baseline.slow_layers))
    if noise := _busy(baseline):
        fewer = " or fewer --threads" if threads > 1 else ""
        display.warn(
            f"Careful: this machine is busy: timings repeat within {noise:.0%}, and latencies are no better than that."
            f" Other programs that are stopped{fewer} make them better."
        )


def _busy(baseline: Baseline) -> float:
    """Returns within what share timings repeat on a machine too busy to time on; 0 on any other."""
    half_width = baseline.evaluation.measurements["latency"].notes["half_width"]
    self_error = abs(baseline.reference_self_ratio - 1)
    is_busy = half_width > WIDE or self_error > NOISY_MACHINE
    return max(half_width, self_error) if is_busy else 0.0
