"""Compares a version layer by layer with the same network in fp32, or with itself on another target."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.artifact import Artifact
from evaluators.bundle.manifest import FILE, Manifest
from evaluators.data import LabelledImages
from evaluators.diagnosis.comparison import Answered, Compared, Side, compare
from evaluators.diagnosis.evidence import Evidence, Finding
from evaluators.diagnosis.rules import find
from evaluators.diagnosis.taps import has_halves, norm_variances
from evaluators.inference.resizing import resized
from evaluators.runtimes.base import Runtime, deployed_stages
from evaluators.runtimes.registry import runtime as open_runtime
from search.config.diagnosis_request import DiagnosisRequest
from search.config.progress import Progress
from search.config.study import FinetuneSection
from search.pipeline.pipeline import CompressionPipeline
from search.results.evaluation import Evaluation
from search.results.store import StoredSearch
from spaces.candidate import Candidate
from spaces.errors import UserError
from spaces.precision import uniform

_STEP = "Comparing"


@dataclass(frozen=True)
class Diagnosis:
    """The comparison of a version with its reference, and the likely causes of differences.

    Args:
        reference: name of the reference.
        version: name of the version.
        target: runtime and device that ran them, as text.
        remarks: notes for the user on how they were run.
        compared: figures of every layer.
        findings: causes, the most important first.
    """

    reference: str
    version: str
    target: str
    remarks: tuple[str, ...]
    compared: Compared
    findings: tuple[Finding, ...]

    @property
    def answered(self) -> Answered:
        """How both classified the images."""
        return self.compared.answered

    def to_json(self) -> str:
        """Returns everything as JSON."""
        answered = self.answered
        content = {
            "reference": self.reference,
            "version": self.version,
            "target": self.target,
            "remarks": list(self.remarks),
            "images": answered.images,
            "accuracy": {
                "reference": answered.before / answered.images,
                "version": answered.right / answered.images,
                "same_answers": answered.same / answered.images,
            },
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [layer.to_dict() for layer in self.compared.layers],
            "unmatched": list(self.compared.unmatched),
        }
        return json.dumps(content, indent=2, allow_nan=False)


@dataclass(frozen=True)
class _Version:
    """The version to diagnose.

    Args:
        name: for people.
        stages: its portable ONNX files.
        own: whether this program exported them; else they are a user's file.
        precisions: those of its layers.
    """

    name: str
    stages: tuple[bytes, ...]
    own: bool
    precisions: frozenset[str]

    def on(self, runtime: Runtime, name: str) -> Side:
        """Returns the version as `runtime` runs it, for a comparison."""
        files = deployed_stages(runtime, self.stages, skips=False) if self.own else self.stages
        return Side(name, runtime, files)


def diagnose(
    pipeline: CompressionPipeline, request: DiagnosisRequest, evaluation: Evaluation | None, progress: Progress
) -> Diagnosis:
    """Returns how a version differs from the same network in fp32, or from itself on another target.

    Args:
        pipeline: of the study.
        request: what to compare.
        evaluation: of the candidate, if it is from a trial or a bundle.
        progress: called after each batch.

    Raises:
        FileError: a file cannot be compared with this network.
        TargetError: the other target is not available.
    """
    candidate = _candidate(pipeline, request, evaluation)
    deployed = pipeline.deployed(candidate, _finetuned(evaluation))
    exact = pipeline.builder.build(deployed.network, replace(candidate, precision={}))
    version = _version(request, deployed.artifact)
    reference, examined = _sides(pipeline, request, version, exact)
    compared = compare(
        reference,
        examined,
        exact.stages,
        _sample(pipeline.data.validation, request.images, candidate.input_size),
        pipeline.data.classes,
        lambda done, total: progress(_STEP, done, total),
    )
    norms = {layer: values for stage in version.stages for layer, values in norm_variances(stage).items()}
    evidence = Evidence(
        reference=reference.name,
        version=examined.name,
        compared=compared,
        has_fp16="fp16" in version.precisions,
        has_8_bits=not version.precisions.isdisjoint(("int8", "fp8")),
        targets=request.other_target is not None,
        variances=_variances(deployed.network.state_dict()) if version.own or not norms else {},
        norms={name.removeprefix("trunk."): values for name, values in norms.items()},
    )
    remarks = _remarks(pipeline, request, version, compared, evaluation)
    return Diagnosis(
        reference.name,
        examined.name,
        f"{pipeline.runtime.version()} on {pipeline.target.device}",
        remarks,
        compared,
        tuple(find(evidence)),
    )


def evaluation_of(request: DiagnosisRequest, search: StoredSearch | None) -> Evaluation | None:
    """Returns the evaluation of the requested trial or bundle; None if the request names neither.

    Raises:
        UserError: there is no such trial, or the folder is no bundle.
    """
    if request.trial is not None and search is not None:
        for version in search.versions:
            if version.number == request.trial:
                return version.evaluation
        known = ", ".join(str(version.number) for version in search.versions[-5:])
        raise UserError(
            f"a trial is one that {search.folder.name} has measured, got {request.trial}; the latest: {known or 'none'}"
        )
    if request.bundle is not None:
        with _reading(request.bundle, "evaluation.json"):
            return Evaluation.from_dict(json.loads((request.bundle / "evaluation.json").read_text("utf-8"))["search"])
    return None


@contextmanager
def _reading(bundle: Path, name: str) -> Iterator[None]:
    """Turns errors of reading a file of a bundle into a `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"a bundle is a folder that `pick` wrote, got {bundle} without a sound {name}") from error


def _candidate(pipeline: CompressionPipeline, request: DiagnosisRequest, evaluation: Evaluation | None) -> Candidate:
    """Returns the candidate to build; it runs every block, and without an evaluation has one precision."""
    if evaluation is not None:
        return evaluation.candidate.without_skips()
    dense = pipeline.space.dense()
    precision = uniform(pipeline.builder.layers, request.precision or "int8")
    return Candidate(dense.channels, precision, dense.thresholds)


def _finetuned(evaluation: Evaluation | None) -> FinetuneSection | None:
    return FinetuneSection.model_validate(evaluation.finetune) if evaluation and evaluation.finetune else None


def _version(request: DiagnosisRequest, artifact: Artifact) -> _Version:
    if request.file is None:
        counts = Counter(artifact.precisions.values())
        mixed = ", ".join(f"{count} layers {precision}" for precision, count in counts.most_common())
        name = request.precision or "int8"
        name = f"trial {request.trial} ({mixed})" if request.trial is not None else name
        return _Version(name, artifact.stages, True, frozenset(counts))
    if request.bundle is not None:
        with _reading(request.bundle, FILE):
            manifest = Manifest.read(request.bundle)
        if manifest.blocks:
            raise UserError(
                f"files that all images go through are compared, got {request.bundle}, which skips blocks;"
                " give its --trial"
            )
        files = manifest.portable_files(request.bundle)
    else:
        files = [request.file]
    try:
        stages = tuple(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(f"a file to compare can be read, got {error.filename}: {error.strerror}") from error
    precisions = {"fp16"} if any(has_halves(stage) for stage in stages) else set[str]()
    precisions |= {"int8"} if any(b"QuantizeLinear" in stage for stage in stages) else set()
    return _Version(request.file.name, stages, request.bundle is not None, frozenset(precisions))


def _sides(
    pipeline: CompressionPipeline, request: DiagnosisRequest, version: _Version, exact: Artifact
) -> tuple[Side, Side]:
    if request.other_target is None:
        return Side("fp32", pipeline.runtime, exact.deployed), version.on(pipeline.runtime, version.name)
    other = open_runtime(request.other_target)
    names = [f"{version.name} on {runtime.name}" for runtime in (pipeline.runtime, other)]
    return version.on(pipeline.runtime, names[0]), version.on(other, names[1])


def _sample(data: LabelledImages, count: int, size: int | None) -> LabelledImages:
    """Returns a random sample of `count` images at a size, because a set may be sorted by class."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(data))[:count])
    return LabelledImages(resized(data.images[chosen], size), data.labels[chosen])


def _variances(state: Mapping[str, Any]) -> dict[str, NDArray[np.generic]]:
    return {
        name.removeprefix("trunk."): tensor.numpy() for name, tensor in state.items() if name.endswith("running_var")
    }


def _remarks(
    pipeline: CompressionPipeline,
    request: DiagnosisRequest,
    version: _Version,
    compared: Compared,
    evaluation: Evaluation | None,
) -> tuple[str, ...]:
    supported = pipeline.runtime.capabilities().precisions
    unsupported = sorted(version.precisions - {*supported, "fp32"})
    remarks = [
        f"a search on {pipeline.runtime.name} here would not offer {precision}, which brings this device nothing:"
        " it was computed in float and rounded as the file says"
        for precision in unsupported
    ]
    if compared.unmatched:
        count, total = len(compared.unmatched), len(compared.unmatched) + len(compared.layers)
        remarks.append(f"{count} of {total} tensors are not in {version.name} under their names, or in another shape")
    if evaluation is not None and evaluation.candidate.active_skips:
        remarks.append("every block was run, also those that images may pass by")
    if request.images > len(pipeline.data.validation):
        remarks.append(f"there are no more than {len(pipeline.data.validation)} validation images")
    return tuple(remarks)
