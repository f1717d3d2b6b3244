"""Everything that a study's trials share, prepared once, and the way of one candidate through it."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch

from evaluators.accuracy import AccuracyEvaluator
from evaluators.artifact import Artifact
from evaluators.artifact.build import ArtifactBuilder
from evaluators.artifact.qdq import Ranges
from evaluators.artifact.scheme import Scheme
from evaluators.data import Splits
from evaluators.examiner import LIMIT_S, PlacementExaminer
from evaluators.flops import FlopsEvaluator
from evaluators.latency import LatencyEvaluator, Reference, median_seconds, reference_batch
from evaluators.latency_cache import LatencyCache
from evaluators.measurement import Measurement
from evaluators.placement import TIMINGS, Examined
from evaluators.size import ParamsEvaluator, SizeEvaluator
from evaluators.subject import Evaluator, Subject
from evaluators.target import Runtime, Spent, Target, runtime
from search.cache import cache_folder, check_cache
from search.evaluation import Evaluation
from search.objects import load, source_of
from search.progress import Progress, Say
from search.recovery import Ground, Recovery, effort_of, recovery
from search.recovery.batchnorm import recovery_images
from search.recovery.finetune import finetune_kept
from search.skipping import skip_blocks
from search.sources.prepared import prepare
from search.study import FinetuneSection, SkipsSection, Study, StudyError
from search.training import augmentation, exit_places, trained_network
from spaces.candidate import Candidate
from spaces.criteria import Evidence, criterion
from spaces.gates import GateSpace
from spaces.grouping import find_groups
from spaces.groups import Groups
from spaces.joint import JointSpace
from spaces.network import ExitNetwork
from spaces.patterns import TWO_OF_FOUR, PatternSpace, offered_patterns
from spaces.precision import PrecisionSpace
from spaces.sparsity import SparsitySpace

StopEarly = Callable[[Mapping[str, Measurement]], bool]


class Workbench:
    """The dense network, the space, and what is needed to build and measure a version of it.

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
        self.study = study
        self._progress = progress
        self.runtime: Runtime = library or runtime(study.target.runtime)
        self.target = _target(study, self.runtime)
        self.loaded, built = prepare(study, download, progress, say)
        self.data = self.loaded.splits
        self.network: ExitNetwork = trained_network(_skipping(study, self.runtime), built, self.data, progress)
        calibration = self.data.calibration.images[:]
        image = torch.from_numpy(calibration[:1])
        scheme = Scheme(**study.quantization.model_dump())
        self.builder = ArtifactBuilder(self.network, calibration, self.runtime, self.target.tf32, scheme)
        progress("Finding the channels that can be cut", 0, 1)
        self.groups = find_groups(self.network, image, self.builder.disagreement)
        progress("Finding the channels that can be cut", 1, 1)
        self.exit_places = exit_places(self.network.trunk, study.exits, self.data)
        self.space = _space(study, self.network, self.groups, self.data, self.builder.layers, self.runtime)
        self._cheap: tuple[Evaluator, ...] = (
            ParamsEvaluator(),
            SizeEvaluator(),
            FlopsEvaluator(self.network, image),
        )
        self._accuracy = AccuracyEvaluator()
        self.ground = self._recovery_ground(progress)

    def _recovery_ground(self, progress: Progress) -> Ground:
        augment = self.study.data.augment
        return Ground(
            network=self.network,
            sparsity=self.space.sparsity,
            train=self.data.train,
            augment=augmentation(augment) if augment else None,
            settings=self.study.recovery,
            folder=cache_folder(),
            key="\0".join(
                (
                    self.fingerprint,
                    repr(self.space.sparsity.description),
                    source_of(load(augment)) if augment else "",
                    torch.__version__,
                )
            ),
            say=progress,
        )

    @cached_property
    def recovery(self) -> Recovery:
        """How pruned networks win accuracy back while the search runs: the same way for all of them."""
        return recovery(self.ground)

    def structure(self) -> dict[str, Any]:
        """Returns, JSON-ready, where the exits and gates are and which channels stay whole."""
        return {
            "exits": asdict(self.exit_places),
            "skips": list(self.network.skip_blocks),
            "groups": [group.name for group in self.groups.free],
            "whole": [asdict(group) for group in self.groups.whole],
        }

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits over the dense network's weights and the images: what every trial builds on."""
        content = hashlib.sha256()
        for tensor in self.network.state_dict().values():
            content.update(tensor.numpy().tobytes())
        for part in (self.data.train, self.data.calibration, self.data.validation, self.data.test):
            content.update(part.digest.encode())
        return content.hexdigest()[:16]

    def references(self) -> dict[str, Artifact]:
        """Returns the dense network in each of the target's precisions: what candidates are timed beside."""
        dense = self.space.dense()
        return {
            precision: self.builder.build(
                self.network, Candidate(dense.channels, dict.fromkeys(dense.precision, precision), dense.thresholds)
            )
            for precision in self.space.precision.precisions
        }

    @property
    def remarks(self) -> list[str]:
        """What of the study's wishes does not come true on this target, in words."""
        found = []
        if _patterns(self.study, self.runtime) != self.study.space.patterns:
            why = f"{self.target.device} has no sparse kernels in {self.target.runtime}"
            found.append(f"pattern {TWO_OF_FOUR} is left out: {why}")
        if _skipping(self.study, self.runtime).skips != self.study.skips:
            found.append(
                f"[skips] is left out: {self.target.runtime} does not skip blocks at batch {self.target.batch}"
            )
        elif self.study.skips.blocks:
            image = torch.zeros(1, *self.data.image_shape)
            found.append(str(skip_blocks(self.network.trunk, self.study.skips, image)).rstrip("."))
        return found

    def time_references(self) -> dict[str, Spent]:
        """Returns what each reference takes for its batch, medians in seconds, timed side by side."""
        images = self.data.validation.images[: reference_batch(self.target.batch)]
        opened = {
            name: self.runtime.open(item.deployed, [], self.target.threads) for name, item in self.references().items()
        }
        return median_seconds(opened, images)

    def latency_evaluator(self, reference_seconds: Mapping[str, float]) -> LatencyEvaluator:
        """Returns the evaluator that tells latencies at the speed which the references had."""
        references = {
            name: Reference(artifact.deployed[0], reference_seconds[name])
            for name, artifact in self.references().items()
        }
        return LatencyEvaluator(references, self.runtime, self.target, cache=LatencyCache(cache_folder() / "latencies"))

    @property
    def examines(self) -> bool:
        """Whether a search begins with a look for layers that are slower in a lower precision."""
        return self.study.space.drop_slower and len(self.space.precision.precisions) > 1

    @property
    def examination_limit(self) -> str:
        """What that costs at most."""
        return f"{TIMINGS} timings and {LIMIT_S[self.runtime.capabilities().compiles]:.0f} s for each precision"

    def examine(self) -> Examined:
        """Returns which layers are slower in a lower precision, measured now or kept from the same network."""
        examiner = PlacementExaminer(
            self.builder,
            self.network,
            self.space.dense(),
            self.space.precision.precisions,
            self.runtime,
            self.target,
            self.data.validation.images,
            LatencyCache(cache_folder() / "placements"),
        )
        return examiner.examine(self._progress)

    def compress(self, candidate: Candidate, more: FinetuneSection | None = None) -> ExitNetwork:
        """Returns the candidate's network in torch, recovered as the study says.

        A network with all of its channels and weights is the one that was given, whatever the level.

        Args:
            candidate: the version.
            more: fine-tuning that comes on top.

        Raises:
            DivergedError: the loss is not finite for the second time.
        """
        if not self.is_pruned(candidate):
            return self.space.apply(self.network, candidate)
        network = self.space.apply(self.recovery.source, candidate)
        self.recovery.recover(network, candidate.channels, candidate.patterns)
        if more is not None:
            start = self.study.recovery.model_dump_json(exclude={"final"})
            images = recovery_images(self.data.train, self.study.recovery.images)
            finetune_kept(
                self.ground,
                network,
                candidate.channels,
                more,
                images,
                start,
                candidate.patterns,
                self.recovery.source,
            )
        return network

    def effort(self, candidate: Candidate, more: FinetuneSection | None = None) -> str:
        """Returns what was done to win the candidate's accuracy back, for the record."""
        if not self.is_pruned(candidate):
            return "as given"
        return self.recovery.effort + (f" + finetune {effort_of(more)}" if more else "")

    def _ranges(self, candidate: Candidate) -> Ranges:
        """Returns the ranges of the activations of the network that the candidate is a slice of."""
        if not self.is_pruned(candidate) or self.recovery.source is self.network:
            return self.builder.ranges
        return self._source_ranges

    @cached_property
    def _source_ranges(self) -> Ranges:
        return self.builder.read_ranges(self.recovery.source, self.data.calibration.images[:])

    def is_pruned(self, candidate: Candidate) -> bool:
        """Returns whether the candidate lacks any channel or weight of the dense network."""
        return bool(candidate.patterns) or bool(self.space.sparsity.kept(candidate.channels))

    def subject(self, candidate: Candidate, more: FinetuneSection | None = None) -> Subject:
        """Returns the candidate, built and ready to be measured; `more` is fine-tuning that comes on top."""
        network = self.compress(candidate, more)
        return self._subject(candidate, network, self.builder.build(network, candidate, self._ranges(candidate)))

    def _subject(self, candidate: Candidate, network: ExitNetwork, artifact: Artifact) -> Subject:
        return Subject(network, candidate, artifact, self.data.validation, self.runtime, self.target)

    def evaluate(
        self, candidate: Candidate, latency: LatencyEvaluator, stop: StopEarly, more: FinetuneSection | None = None
    ) -> Evaluation:
        """Returns what was measured of a candidate, cheapest metrics first.

        Args:
            candidate: the version.
            latency: measures it beside the references.
            stop: told what is known after each metric; where it says so, the rest is not measured.
            more: fine-tuning that comes on top of the study's recovery.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "compress"):
            network = self.compress(candidate, more)
        with _timed(seconds, "build"):
            artifact = self.builder.build(network, candidate, self._ranges(candidate))
        subject = self._subject(candidate, network, artifact)
        with _timed(seconds, "load"):
            _ = subject.opened
        measured: dict[str, Measurement] = {}
        for evaluator in (*self._cheap, latency, self._accuracy):
            with _timed(seconds, evaluator.metric):
                measured[evaluator.metric] = evaluator.measure(subject)
            if stop(measured):
                break
        added = more.model_dump(mode="json") if more and self.is_pruned(candidate) else None
        return Evaluation(candidate, measured, self.effort(candidate, more), artifact.digest, seconds, added)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - begin


def _target(study: Study, library: Runtime) -> Target:
    wanted, device = study.target, library.device()
    if wanted.tf32 and not library.capabilities().tf32:
        raise StudyError(
            f"target.tf32 wants TensorRT on a GPU from Ampere on, got {wanted.runtime} on {device}; leave it out"
        )
    return Target(wanted.runtime, device, wanted.batch, wanted.threads, wanted.tf32)


def _space(
    study: Study, network: ExitNetwork, groups: Groups, data: Splits, layers: tuple[str, ...], target: Runtime
) -> JointSpace:
    able = target.capabilities()
    steps = [able.channel_steps[precision] for precision in able.precisions]
    exits = network.exit_names if study.target.batch == 1 or able.dynamic_batch else ()
    evidence = Evidence(torch.from_numpy(data.calibration.images[:]), torch.from_numpy(data.calibration.labels))
    scores = criterion(study.space.criterion)(network, groups.free, evidence)
    return JointSpace(
        SparsitySpace(groups.free, scores, min(steps), study.space.keep_at_least, max(steps)),
        PrecisionSpace(layers, able.precisions),
        GateSpace(exits, study.space.lowest_threshold, study.space.threshold_step, network.skip_blocks),
        PatternSpace(offered_patterns(network, groups.free, min(steps), _patterns(study, target))),
    )


def _skipping(study: Study, target: Runtime) -> Study:
    """Returns the study without gates where the target does not skip what they say."""
    able = target.capabilities()
    able_to = able.skips and (study.target.batch == 1 or able.dynamic_batch)
    return study if able_to else study.model_copy(update={"skips": SkipsSection()})


def _patterns(study: Study, target: Runtime) -> tuple[str, ...]:
    """Returns the study's patterns of zeros but for 2:4 where the target has no kernels for it."""
    able = target.capabilities().sparse_2_4
    return tuple(pattern for pattern in study.space.patterns if able or pattern != TWO_OF_FOUR)
