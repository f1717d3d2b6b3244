"""The evaluation of one candidate, as a trial stores it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from evaluators.measurement import Measurement
from spaces.candidate import Candidate


@dataclass(frozen=True)
class Evaluation:
    """A candidate and its measurements.

    Args:
        candidate: the version.
        measurements: by metric; the expensive ones are missing if a limit was broken before.
        effort: the recovery before measuring, as text.
        digest: of the deployed artifact; empty if none was built.
        seconds: of each step.
        finetune: settings of fine-tuning on top of the search's recovery, or None.
        exit_thresholds: record of how exit thresholds were solved, or None; see `ResolvedThresholds.to_dict`.
        ended: why it was stopped early, with an accuracy estimated from some of the images; empty if it was not.
        trained: what its own fine-tuning took, in `images` shown and `seconds` of processor time; empty for none.
        answers: what solved its thresholds, JSON-ready, to solve them for other limits; a trial keeps it beside this.
    """

    candidate: Candidate
    measurements: Mapping[str, Measurement]
    effort: str
    digest: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    finetune: Mapping[str, Any] | None = None
    exit_thresholds: Mapping[str, Any] | None = None
    ended: str = ""
    trained: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return {
            "candidate": self.candidate.to_dict(),
            "measurements": {name: measurement.to_dict() for name, measurement in self.measurements.items()},
            "effort": self.effort,
            "digest": self.digest,
            "seconds": dict(self.seconds),
            "finetune": dict(self.finetune) if self.finetune else None,
            "gates": dict(self.exit_thresholds) if self.exit_thresholds else None,
            "ended": self.ended,
            **({"trained": dict(self.trained)} if self.trained else {}),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the evaluation that `to_dict` described."""
        return cls(
            Candidate.from_dict(content["candidate"]),
            {name: Measurement.from_dict(measurement) for name, measurement in content["measurements"].items()},
            content["effort"],
            content["digest"],
            content["seconds"],
            content["finetune"],
            content.get("gates"),
            content.get("ended", ""),
            content.get("trained", {}),
        )
