"""A search from its study to its journal: prepare, measure what has to be beaten, try, recover the front."""

from dataclasses import dataclass, replace

import optuna

from evaluators.runtimes.base import Runtime
from search.config.overrides import Ending
from search.config.study import Study
from search.config.units import milliseconds, percent
from search.loop.baseline import measure_baseline
from search.loop.coordinator import Outcome, build_coordinator
from search.loop.front_recovery import recover_front
from search.loop.greedy_widths import greedy_seeds
from search.loop.resume import check_same_network, is_counted, requeue_running
from search.pipeline.given_network import GivenNetwork
from search.pipeline.pipeline import CompressionPipeline, build_pipeline
from search.pipeline.sensitivity_profiler import Profiler
from search.report.describe import examined_layers, simple_lines
from search.report.display import Display, SearchView
from search.report.overview import write_profile
from search.results.simple_versions import GivenMeasurements
from search.results.store import Baseline, SearchFolder, StoredSearch, read_given, store_given, store_sampler
from search.tracking.mirror import Follower
from search.tracking.store import Tracking, remember, remembered

NEAR_CHANCE = 1.5
"""A network whose accuracy is below so many times that of a guess is probably not trained."""
_AS_SEARCHED = "# As it was searched: every key, and paths that hold from any folder.\n"


@dataclass(frozen=True)
class SearchRun:
    """One run of a search: the first, or one that goes on.

    Args:
        folder: of the search.
        study: the question.
        ending: when it ends.
        sampler: proposes candidates.
        seed: of the sampler.
        display: what the terminal shows.
        runtime: of the study's target.
        download: whether weights and images that are not here may be fetched.
        tracking_uri: where MLflow is; beside the searches where not given.
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
            f"Searching study {self.study.name} within {self.study.budget} on {self.study.target.runtime}."
        )
        with self.folder.lock():
            journal = self.folder.create()
            given, simple = self._measure_given(journal)
            pipeline = self._build(journal, given)
            if "baseline" not in journal.user_attrs:
                self._measure_baseline(journal, pipeline, simple)
            outcome = self._try(journal, pipeline)
        self._say_end(outcome)
        return outcome.code

    @property
    def _trials(self) -> int:
        return self.ending.trials or self.study.search.trials

    def _measure_given(self, journal: optuna.Study) -> tuple[GivenNetwork, GivenMeasurements | None]:
        """Returns the network as it is, and what it comes to in each precision where that is not in the journal.

        That is before exits, gates or weights for pruned versions are trained: the first answer comes first.
        """
        given = GivenNetwork(self.study, self.display.step, self.runtime, self.display.say, self.download)
        if "baseline" in journal.user_attrs:
            return given, None
        simple = read_given(journal)
        if simple is None or (simple.question, simple.network) != (self.study.question_key, given.fingerprint):
            simple = given.measure(self.display.step)
            store_given(journal, simple)
        for line in simple_lines(simple):
            self.display.say(line)
        return given, simple

    def _build(self, journal: optuna.Study, given: GivenNetwork) -> CompressionPipeline:
        """Returns the pipeline, and says what of the study's wishes comes true."""
        display = self.display
        pipeline = build_pipeline(self.study, display.step, self.runtime, display.say, self.download, given)
        display.say(f"{pipeline.exit_places} {pipeline.groups}")
        check_same_network(self.folder, journal.user_attrs.get("fingerprint"), pipeline.fingerprint)
        requeue_running(journal)
        effort = f"Recovery of pruned versions: {pipeline.compressor.recovery.effort}."
        none = "No version loses channels or weights, so none is recovered."
        display.say(effort if pipeline.compressor.may_be_needed else none)
        for remark in pipeline.remarks:
            display.say(f"Note: {remark}.")
        return pipeline

    def _measure_baseline(
        self, journal: optuna.Study, pipeline: CompressionPipeline, simple: GivenMeasurements | None
    ) -> None:
        """Measures what has to be beaten, and writes down what the search is about."""
        self.display.say("Measuring the dense network...")
        (self.folder.path / "study.toml").write_text(_AS_SEARCHED + self.study.to_toml(), encoding="utf-8")
        pipeline.given.loaded.write(self.folder.path)
        journal.set_user_attr("study", self.study.model_dump(mode="json"))
        journal.set_user_attr("fingerprint", pipeline.fingerprint)
        journal.set_user_attr("structure", pipeline.structure())
        baseline = measure_baseline(pipeline, simple, self._trials, self.ending.timeout_s, self.display.step)
        journal.set_user_attr("baseline", baseline.to_dict())

    def _try(self, journal: optuna.Study, pipeline: CompressionPipeline) -> Outcome:
        """Tries candidates, recovers the front where the study asks for it, and mirrors all into MLflow."""
        store_sampler(journal, self.sampler)
        tracking = Tracking.of(self.folder.path.parent, self.tracking_uri, remembered(journal))
        remember(journal, tracking, self.folder.path.parent)
        search, display = StoredSearch.read(self.folder), self.display
        _say_baseline(search.baseline, pipeline.data.classes, display)
        mirror = Follower(tracking, search, display.warn)
        mirror.begin()
        done = sum(is_counted(trial) for trial in search.trials)
        if done:
            display.say(f"Going on with search {self.folder.name}: {done} trials are there")
        lines = search.baseline.versions_to_beat
        view = SearchView(display, search.versions, search.budget, lines[0], done, self._trials, lines)
        seeds = greedy_seeds(pipeline, display.step, display.say) if self.study.search.warm_start else []
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
    """Recovers the front in full where the study asks for it; returns how the search ended then."""
    try:
        done = recover_front(pipeline, journal, baseline, display.say)
    except KeyboardInterrupt:
        return replace(outcome, reason="interrupted", code=130)
    if done:
        return replace(outcome, reason=f"{outcome.reason}, and {done} versions of the front were recovered in full")
    return outcome


def _say_baseline(baseline: Baseline, classes: int, display: Display) -> None:
    measured = baseline.evaluation.measurements
    display.say(
        f"Dense network: {milliseconds(measured['latency'].value)} per batch on {measured['latency'].target},"
        f" accuracy {percent(measured['accuracy'].value)}."
    )
    if not all(each.is_own for each in baseline.simple):
        display.say("That is with what was trained for it; what was given has to be beaten as well:")
        for line in baseline.versions_to_beat[1:]:
            told = milliseconds(line.measured["latency"].value), percent(line.measured["accuracy"].value)
            display.say(f"  {line.title}  {told[0]}  accuracy {told[1]}")
    if measured["accuracy"].value < NEAR_CHANCE / classes:
        display.warn(
            f"CAREFUL: that is hardly better than guessing among {classes} classes. Is the network trained? Give"
            " --weights, or train it with a section [training] in a study file. Is its input as it was trained with?"
        )
    if baseline.examined is not None:
        display.say(examined_layers(baseline.examined))
    half_width = measured["latency"].notes["half_width"]
    if half_width > 0.1:
        display.warn(f"Careful: its latency is known to within {half_width:.0%} only; fewer threads are timed better.")
    if abs(baseline.same_twice - 1) > 0.05:
        display.warn(
            f"Careful: this machine is noisy. The same network timed against itself differed by"
            f" {abs(baseline.same_twice - 1):.0%}; latencies are no better than that."
        )
