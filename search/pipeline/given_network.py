"""The user's network as loaded, measured in each precision before exits, gates or masks are added to it."""

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

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
from evaluators.runtimes.registry import runtime as open_runtime
from search.config.cache import cache_folder, check_cache
from search.config.progress import Progress, Say
from search.config.study import Study
from search.loading.prepare import prepare
from search.loading.streams import with_streams
from search.pipeline.early_stopping import shuffled_if_many
from search.pipeline.evaluators import all_evaluators
from search.pipeline.search_space import (
    asked_sizes,
    input_sizes,
    target_of,
    without_fixed_dimensions,
    without_unsupported_gates,
)
from search.results.evaluation import Evaluation
from search.results.simple_versions import GivenMeasurements, SimpleVersion
from search.training.dense import exit_places, trained_trunk
from spaces.candidate import Candidate
from spaces.dynamic.exit_network import ExitNetwork
from spaces.precision import uniform

NO_RECOVERY = "as given"
"""The recovery noted for a network that keeps all channels and weights: none."""
_STEP = "Measuring the network as it is"


class GivenNetwork:
    """A study's images and its dense network, trained if the study asks for it, without exits, gates or masks.

    Args:
        study: what to search.
        progress: called with the progress of long steps.
        runtime: executes the artifacts; by default the one that the study names.
        say: called with remarks for the user on the network and the images.
        download: whether missing weights and images may be downloaded.

    Raises:
        SourceError: there is no such network, or there are no such images.
        UserCodeError: the study's factories do not return a network and images.
        ExportError: the network cannot be written as ONNX; one that is trained is tried before.
        TargetError: the study's runtime is not available here.
    """

    def __init__(
        self,
        study: Study,
        progress: Progress,
        runtime: Runtime | None = None,
        say: Say = lambda _: None,
        download: bool = False,
    ) -> None:
        check_cache()
        self.study = study = without_fixed_dimensions(study)
        self.runtime: Runtime = runtime or open_runtime(study.target.runtime)
        self.target = target_of(study, self.runtime)
        self.loaded, self.built = prepare(study, download, progress, say)
        self.data = with_streams(study.frames, self.loaded.splits)
        asked_sizes(study, self.data.image_shape)  # before anything is trained
        if self.built.training(study.training):
            self._check_export()
        trunk = trained_trunk(without_unsupported_gates(study, self.runtime), self.built, self.data, progress)
        self._trunk = copy.deepcopy(trunk)  # training of exits and gates may change the original

    @cached_property
    def network(self) -> ExitNetwork:
        """The network without exits, its channels equalized if the study asks for it."""
        network = ExitNetwork(self._trunk, [], []).eval()
        image = torch.from_numpy(self.data.calibration.images[:1])
        return equalized(network, image) if self.study.quantization.equalize else network

    def _check_export(self) -> None:
        """Checks that the network can be exported, at every size that the study names, before it is trained.

        Raises:
            ExportError: it cannot.
            StudyError: not at one of the sizes.
        """
        network = ExitNetwork(self.built.network, [], []).eval()
        images = self.data.calibration.images[:2]
        builder = self._builder_of(network, images)
        input_sizes(self.study, network, torch.from_numpy(images[:1]), builder.disagreement)

    @cached_property
    def builder(self) -> ArtifactBuilder:
        """Exports the network to ONNX."""
        return self._builder_of(self.network, self.data.calibration.images[:])

    def _builder_of(self, network: ExitNetwork, calibration: NDArray[np.float32]) -> ArtifactBuilder:
        scheme = Scheme(**self.study.quantization.model_dump())
        return ArtifactBuilder(network, calibration, self.runtime, self.target.fp32_in, scheme)

    @cached_property
    def scored(self) -> LabelledImages:
        """The validation images that versions are scored on: without those that choose thresholds, if any do."""
        places = exit_places(self._trunk, self.study.exits, self.data)
        supports_exits = self.study.target.batch == 1 or self.runtime.capabilities().dynamic_batch
        solves_thresholds = self.study.exits.thresholds == "solved" and self.study.frames is None
        split = bool(places.after) and supports_exits and solves_thresholds
        return validation_parts(self.data, split, self.study.exits.choose_on)[1]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over the network's weights and the images."""
        return fingerprint_of(self.network, self.data)

    def measure(self, progress: Progress) -> GivenMeasurements:
        """Returns the network's full measurements in each of the target's precisions, even over the budget."""
        capabilities = self.runtime.capabilities()
        precisions = capabilities.precisions
        storage = [precision for precision in self.study.space.storage if precision in capabilities.storage]
        files = {precision: self.deployed(precision).artifact for precision in (*precisions, *storage)}
        spent = time_references(files, self.runtime, self.target, self.data)
        seconds = {precision: times.work for precision, times in spent.items()}
        latency = latency_evaluator(files, seconds, self.runtime, self.target)
        simple = []
        for done, precision in enumerate(precisions):
            progress(_STEP, done, len(precisions))
            simple.append(self.evaluate(precision, latency))
        progress(_STEP, len(simple), len(simple))
        forms = {precision: nameless_digest(artifact.deployed[0]) for precision, artifact in files.items()}
        return GivenMeasurements(self.study.question_key, self.fingerprint, spent, forms, tuple(simple))

    def evaluate(self, precision: str, latency: LatencyEvaluator) -> SimpleVersion:
        """Returns all measurements of the network in one precision."""
        seconds: dict[str, float] = {}
        with timed(seconds, "build"):
            deployed = self.deployed(precision)
        flops = FlopsEvaluator(self.network, torch.from_numpy(self.data.calibration.images[:1]))
        measured = {}
        for evaluator in all_evaluators(flops, latency):
            with timed(seconds, evaluator.metric):
                measured[evaluator.metric] = evaluator.measure(deployed)
        evaluation = Evaluation(deployed.candidate, measured, NO_RECOVERY, deployed.artifact.digest, seconds)
        return SimpleVersion(precision, evaluation, is_own=False)

    def deployed(self, precision: str) -> DeployedCandidate:
        """Returns the network in one precision, exported and ready to measure."""
        candidate = Candidate({}, uniform(self.builder.layers, precision))
        artifact = self.builder.build(self.network, candidate)
        return DeployedCandidate(self.network, candidate, artifact, self.scored, self.runtime, self.target)


def validation_parts(data: Splits, split: bool, choose_on: int | None) -> tuple[LabelledImages, LabelledImages]:
    """Returns the validation images that choose thresholds, and those that score versions.

    Args:
        data: images of the study.
        split: whether these are separate; else both are all validation images.
        choose_on: how many images choose thresholds; half of them where not given, and at most.
    """
    images = data.validation
    if not split:
        return images, shuffled_if_many(images)
    half = (len(images) + 1) // 2
    choosing, scored = images.parted(min(choose_on or half, half))
    return choosing, shuffled_if_many(scored)


def fingerprint_of(network: ExitNetwork, data: Splits) -> str:
    """Returns sixteen hexadecimal digits over a network's weights and the images."""
    content = hashlib.sha256()
    state = network.state_dict()
    constants = [buffer for name, buffer in network.named_buffers() if name not in state]
    for tensor in (*state.values(), *constants):
        content.update(tensor.numpy().tobytes())
    for part in (data.train, data.calibration, data.validation, data.test):
        content.update(part.digest.encode())
    return content.hexdigest()[:16]


def time_references(files: Mapping[str, Artifact], runtime: Runtime, target: Target, data: Splits) -> dict[str, Spent]:
    """Returns the median seconds per batch of each reference, timed in turns."""
    images = data.validation.images[: reference_batch(target.batch)]
    sessions = {name: runtime.open(artifact.deployed, [], target.threads) for name, artifact in files.items()}
    return median_seconds(sessions, images)


def latency_evaluator(
    files: Mapping[str, Artifact], seconds: Mapping[str, float], runtime: Runtime, target: Target
) -> LatencyEvaluator:
    """Returns the evaluator of latencies, scaled to the machine speed at which the references took `seconds`."""
    references = {name: Reference(artifact.deployed[0], seconds[name]) for name, artifact in files.items()}
    return LatencyEvaluator(references, runtime, target, cache=LatencyCache(cache_folder() / "latencies"))


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Notes the seconds that the `with` block takes."""
    begin = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - begin
