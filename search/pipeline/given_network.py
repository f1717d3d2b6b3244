"""The network as it was given, measured in each precision before exits, gates or masks are trained for it."""

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch

from evaluators.accuracy import AccuracyEvaluator
from evaluators.artifact import Artifact
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import LabelledImages, Splits
from evaluators.deployed import DeployedCandidate
from evaluators.flops.evaluator import FlopsEvaluator
from evaluators.graph.digest import nameless_digest
from evaluators.latency.cache import LatencyCache
from evaluators.latency.evaluator import LatencyEvaluator, Reference, median_seconds, reference_batch
from evaluators.quantization.equalization import equalized
from evaluators.quantization.scheme import Scheme
from evaluators.runtimes.base import Runtime, Spent, Target
from evaluators.runtimes.registry import runtime
from evaluators.size import ParamsEvaluator, SizeEvaluator
from search.config.cache import cache_folder, check_cache
from search.config.progress import Progress, Say
from search.config.study import Study
from search.loading.prepare import prepare
from search.loading.streams import with_streams
from search.pipeline.early_stopping import mixed_if_many
from search.pipeline.search_space import runnable, searched, target_of
from search.results.evaluation import Evaluation
from search.results.simple_versions import Given, Simple
from search.training.dense import exit_places, trained_trunk
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.precision import uniform

AS_GIVEN = "as given"
"""The effort at winning accuracy back that a network which lacks nothing has behind it."""


class GivenNetwork:
    """A study's images and its dense network, trained where the study says so, with nothing added to it.

    Args:
        study: the question.
        progress: told about the steps that take long.
        library: what runs the artifacts; the study's runtime where not given.
        say: told what the user should know about the network and the images.
        download: whether weights and images that are not here may be fetched.

    Raises:
        SourceError: there is no such network, or there are no such images.
        UserCodeError: the study's factories give something else than a network and images.
        TargetError: the study's runtime is not available here.
    """

    def __init__(
        self,
        study: Study,
        progress: Progress,
        library: Runtime | None = None,
        say: Say = lambda _: None,
        download: bool = False,
    ) -> None:
        check_cache()
        self.study = study = searched(study)
        self.runtime: Runtime = library or runtime(study.target.runtime)
        self.target = target_of(study, self.runtime)
        self.loaded, self.built = prepare(study, download, progress, say)
        self.data = with_streams(study.frames, self.loaded.splits)
        trunk = trained_trunk(runnable(study, self.runtime), self.built, self.data, progress)
        self._trunk = copy.deepcopy(trunk)  # what is added to it may train it further

    @cached_property
    def network(self) -> ExitNetwork:
        """The network without exits, its channels equalized where the study asks for it."""
        network = ExitNetwork(self._trunk, [], []).eval()
        image = torch.from_numpy(self.data.calibration.images[:1])
        return equalized(network, image) if self.study.quantization.equalize else network

    @cached_property
    def builder(self) -> ArtifactBuilder:
        """Writes its files."""
        scheme = Scheme(**self.study.quantization.model_dump())
        calibration = self.data.calibration.images[:]
        return ArtifactBuilder(self.network, calibration, self.runtime, self.target.fp32_in, scheme)

    @cached_property
    def scored(self) -> LabelledImages:
        """The images that versions are scored on: half of the validation images where thresholds will be chosen."""
        places = exit_places(self._trunk, self.study.exits, self.data)
        can_leave = self.study.target.batch == 1 or self.runtime.capabilities().dynamic_batch
        solves = self.study.exits.thresholds == "solved" and self.study.frames is None
        return validation_parts(self.data, bool(places.after) and can_leave and solves)[1]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over the network's weights and the images."""
        return fingerprint_of(self.network, self.data)

    def measured(self, progress: Progress) -> Given:
        """Returns the network's figures in each of the target's precisions, whatever limit they break."""
        able = self.runtime.capabilities()
        stored = [each for each in self.study.space.storage if each in able.storage]
        files = {each: self.subject(each).artifact for each in (*able.precisions, *stored)}
        spent = time_references(files, self.runtime, self.target, self.data)
        latency = latency_evaluator(files, {name: each.work for name, each in spent.items()}, self.runtime, self.target)
        simple = []
        for done, precision in enumerate(able.precisions):
            progress("Measuring the network as it is", done, len(able.precisions))
            simple.append(self.simple(precision, latency))
        progress("Measuring the network as it is", len(simple), len(simple))
        forms = {name: nameless_digest(artifact.deployed[0]) for name, artifact in files.items()}
        return Given(self.study.question_key, self.fingerprint, spent, forms, tuple(simple))

    def simple(self, precision: str, latency: LatencyEvaluator) -> Simple:
        """Returns what was measured of the network in one precision."""
        seconds: dict[str, float] = {}
        with timed(seconds, "build"):
            subject = self.subject(precision)
        flops = FlopsEvaluator(self.network, torch.from_numpy(self.data.calibration.images[:1]))
        measured = {}
        for evaluator in (ParamsEvaluator(), SizeEvaluator(), flops, latency, AccuracyEvaluator()):
            with timed(seconds, evaluator.metric):
                measured[evaluator.metric] = evaluator.measure(subject)
        found = Evaluation(subject.candidate, measured, AS_GIVEN, subject.artifact.digest, seconds)
        return Simple(precision, found, is_own=False)

    def subject(self, precision: str) -> DeployedCandidate:
        """Returns the network in one precision, built and ready to be measured."""
        candidate = Candidate({}, uniform(self.builder.layers, precision), {})
        artifact = self.builder.build(self.network, candidate)
        return DeployedCandidate(self.network, candidate, artifact, self.scored, self.runtime, self.target)


def validation_parts(data: Splits, chooses: bool) -> tuple[LabelledImages, LabelledImages]:
    """Returns the validation images that thresholds are chosen on, and those that versions are scored on.

    Args:
        data: of a study.
        chooses: whether thresholds are chosen, on images of their own.
    """
    choosing, scored = data.validation.halves() if chooses else (data.validation, data.validation)
    return choosing, mixed_if_many(scored)


def fingerprint_of(network: ExitNetwork, data: Splits) -> str:
    """Returns sixteen hexadecimal digits over a network's weights and the images."""
    content = hashlib.sha256()
    for tensor in network.state_dict().values():
        content.update(tensor.numpy().tobytes())
    for part in (data.train, data.calibration, data.validation, data.test):
        content.update(part.digest.encode())
    return content.hexdigest()[:16]


def time_references(files: Mapping[str, Artifact], library: Runtime, target: Target, data: Splits) -> dict[str, Spent]:
    """Returns what each reference takes for its batch, medians in seconds, timed side by side."""
    images = data.validation.images[: reference_batch(target.batch)]
    opened = {name: library.open(item.deployed, [], target.threads) for name, item in files.items()}
    return median_seconds(opened, images)


def latency_evaluator(
    files: Mapping[str, Artifact], seconds: Mapping[str, float], library: Runtime, target: Target
) -> LatencyEvaluator:
    """Returns the evaluator that tells latencies at the speed which the references had."""
    references = {name: Reference(artifact.deployed[0], seconds[name]) for name, artifact in files.items()}
    return LatencyEvaluator(references, library, target, cache=LatencyCache(cache_folder() / "latencies"))


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Notes how long what is done inside takes."""
    begin = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - begin
