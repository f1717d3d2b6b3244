"""What one trial found out about one candidate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from evaluators.measurement import Measurement
from spaces.candidate import Candidate


@dataclass(frozen=True)
class Evaluation:
    """A candidate and what was measured of it.

    Args:
        candidate: the version.
        measurements: by metric; a broken hard budget leaves the dear ones out.
        effort: the recovery that came before them.
        digest: of the deployed artifact; empty where none was built.
        seconds: what each step took.
        finetune: the fine-tuning that came on top of the search's own recovery, in the study's terms; None without.
        exit_thresholds: what they came to on the images that they were chosen on; None where nobody chose.
        ended: why it was ended early, its accuracy being known from some of the images only; empty where it was not.
    """

    candidate: Candidate
    measurements: Mapping[str, Measurement]
    effort: str
    digest: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    finetune: Mapping[str, Any] | None = None
    exit_thresholds: Mapping[str, Any] | None = None
    ended: str = ""

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
        )
