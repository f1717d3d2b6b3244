"""Where a version of a network departs from its float self: which two are compared, and on what."""

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
from evaluators.runtimes.base import Runtime, deployed_stages
from evaluators.runtimes.registry import runtime
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
    """What was compared and what was found.

    Args:
        reference: what is right, in words.
        version: what is examined, in words.
        target: what ran them.
        remarks: what the user should know about how they were run.
        compared: the figures of every layer.
        findings: the most important first.
    """

    reference: str
    version: str
    target: str
    remarks: tuple[str, ...]
    compared: Compared
    findings: tuple[Finding, ...]

    @property
    def answered(self) -> Answered:
        """What both said to the images."""
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
    """What is examined: portable files, what they are called, and whether our own writer made them."""

    name: str
    stages: tuple[bytes, ...]
    own: bool
    precisions: frozenset[str]

    def on(self, library: Runtime, name: str) -> Side:
        files = deployed_stages(library, self.stages, skips=False) if self.own else self.stages
        return Side(name, library, files)


def diagnose(
    pipeline: CompressionPipeline, wanted: DiagnosisRequest, evaluation: Evaluation | None, progress: Progress
) -> Diagnosis:
    """Returns how a version of a study's network differs from its float self, or from itself on another target.

    Args:
        pipeline: the study's.
        wanted: what is compared.
        evaluation: of the candidate, where it is a trial's or a bundle's.
        progress: told how far it is.

    Raises:
        FileError: a file cannot be compared with this network.
        TargetError: the other target is not here.
    """
    candidate = _candidate(pipeline, wanted, evaluation)
    subject = pipeline.deployed(candidate, _finetuned(evaluation))
    exact = pipeline.builder.build(subject.network, replace(candidate, precision={}))
    version = _version(wanted, subject.artifact)
    reference, examined = _sides(pipeline, wanted, version, exact)
    compared = compare(
        reference,
        examined,
        exact.stages,
        _some(pipeline.data.validation, wanted.images),
        pipeline.data.classes,
        lambda done, total: progress(_STEP, done, total),
    )
    norms = {layer: values for stage in version.stages for layer, values in norm_variances(stage).items()}
    case = Evidence(
        reference=reference.name,
        version=examined.name,
        compared=compared,
        has_fp16="fp16" in version.precisions,
        has_8_bits=not version.precisions.isdisjoint(("int8", "fp8")),
        targets=wanted.other_target is not None,
        variances=_variances(subject.network.state_dict()) if version.own or not norms else {},
        norms={name.removeprefix("trunk."): values for name, values in norms.items()},
    )
    remarks = _remarks(pipeline, wanted, version, compared, evaluation)
    return Diagnosis(
        reference.name,
        examined.name,
        f"{pipeline.runtime.version()} on {pipeline.target.device}",
        remarks,
        compared,
        tuple(find(case)),
    )


def evaluation_of(wanted: DiagnosisRequest, search: StoredSearch | None) -> Evaluation | None:
    """Returns what is known of the candidate: from the search's trial or the bundle; None where neither is wanted.

    Raises:
        UserError: there is no such trial, or the folder is no bundle.
    """
    if wanted.trial is not None and search is not None:
        for version in search.versions:
            if version.number == wanted.trial:
                return version.evaluation
        known = ", ".join(str(version.number) for version in search.versions[-5:])
        raise UserError(
            f"a trial is one that {search.folder.name} has measured, got {wanted.trial}; the latest: {known or 'none'}"
        )
    if wanted.bundle is not None:
        with _sound(wanted.bundle, "evaluation.json"):
            return Evaluation.from_dict(json.loads((wanted.bundle / "evaluation.json").read_text("utf-8"))["search"])
    return None


@contextmanager
def _sound(bundle: Path, name: str) -> Iterator[None]:
    """Turns what goes wrong with a file of a bundle into what its user can do about it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"a bundle is a folder that `pick` wrote, got {bundle} without a sound {name}") from error


def _candidate(pipeline: CompressionPipeline, wanted: DiagnosisRequest, evaluation: Evaluation | None) -> Candidate:
    """Returns the version to build, in which every block is run; a uniform one and a single file have no exits."""
    if evaluation is not None:
        return evaluation.candidate.without_skips()
    dense = pipeline.space.dense()
    precision = uniform(pipeline.builder.layers, wanted.precision or "int8")
    return Candidate(dense.channels, precision, dense.thresholds)


def _finetuned(evaluation: Evaluation | None) -> FinetuneSection | None:
    return FinetuneSection.model_validate(evaluation.finetune) if evaluation and evaluation.finetune else None


def _version(wanted: DiagnosisRequest, artifact: Artifact) -> _Version:
    if wanted.file is None:
        written = Counter(artifact.precisions.values())
        mixed = ", ".join(f"{count} layers {precision}" for precision, count in written.most_common())
        name = wanted.precision or "int8"
        name = f"trial {wanted.trial} ({mixed})" if wanted.trial is not None else name
        return _Version(name, artifact.stages, True, frozenset(written))
    if wanted.bundle is not None:
        with _sound(wanted.bundle, FILE):
            manifest = Manifest.read(wanted.bundle)
        if manifest.blocks:
            raise UserError(
                f"files that all images go through are compared, got {wanted.bundle}, which skips blocks;"
                " give its --trial"
            )
        files = manifest.portable_files(wanted.bundle)
    else:
        files = [wanted.file]
    try:
        stages = tuple(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(f"a file to compare can be read, got {error.filename}: {error.strerror}") from error
    found = {"fp16"} if any(has_halves(stage) for stage in stages) else set[str]()
    found |= {"int8"} if any(b"QuantizeLinear" in stage for stage in stages) else set()
    return _Version(wanted.file.name, stages, wanted.bundle is not None, frozenset(found))


def _sides(
    pipeline: CompressionPipeline, wanted: DiagnosisRequest, version: _Version, exact: Artifact
) -> tuple[Side, Side]:
    if wanted.other_target is None:
        return Side("fp32", pipeline.runtime, exact.deployed), version.on(pipeline.runtime, version.name)
    other = runtime(wanted.other_target)
    here, there = (f"{version.name} on {library.name}" for library in (pipeline.runtime, other))
    return version.on(pipeline.runtime, here), version.on(other, there)


def _some(data: LabelledImages, count: int) -> LabelledImages:
    """Returns some images of all classes: a set may be sorted by class."""
    chosen = np.sort(np.random.default_rng(0).permutation(len(data))[:count])
    return LabelledImages(data.images[chosen], data.labels[chosen])


def _variances(state: Mapping[str, Any]) -> dict[str, NDArray[np.generic]]:
    return {
        name.removeprefix("trunk."): tensor.numpy() for name, tensor in state.items() if name.endswith("running_var")
    }


def _remarks(
    pipeline: CompressionPipeline,
    wanted: DiagnosisRequest,
    version: _Version,
    compared: Compared,
    evaluation: Evaluation | None,
) -> tuple[str, ...]:
    able = pipeline.runtime.capabilities().precisions
    foreign = sorted(version.precisions - {*able, "fp32"})
    found = [
        f"a search on {pipeline.runtime.name} here would not offer {precision}, which brings this device nothing:"
        " it was computed in float and rounded as the file says"
        for precision in foreign
    ]
    if compared.unmatched:
        count, total = len(compared.unmatched), len(compared.unmatched) + len(compared.layers)
        found.append(f"{count} of {total} tensors are not in {version.name} under their names, or in another shape")
    if evaluation is not None and evaluation.candidate.active_skips:
        found.append("every block was run, also those that images may pass by")
    if wanted.images > len(pipeline.data.validation):
        found.append(f"there are no more than {len(pipeline.data.validation)} validation images")
    return tuple(found)
