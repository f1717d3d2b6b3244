"""Simple versions: the network in each precision, unpruned and without exits, as the baselines of a search."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from evaluators.runtimes.base import Spent
from search.results.evaluation import Evaluation

_GIVEN = "given-"


@dataclass(frozen=True)
class SimpleVersion:
    """One simple version, measured in full even if it breaks a limit.

    Args:
        precision: of all layers that support it.
        evaluation: its measurements.
        is_own: whether it is exported from the search's own network; else from the user's network as loaded, before
            training of exits, gates, masks or int8 changed its weights.
    """

    precision: str
    evaluation: Evaluation
    is_own: bool = True

    @property
    def name(self) -> str:
        """The name that users see: `int8`, or `given-int8` for the network as loaded if its file differs."""
        return self.precision if self.is_own else f"{_GIVEN}{self.precision}"

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return {"precision": self.precision, "evaluation": self.evaluation.to_dict(), "is_own": self.is_own}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the version that `to_dict` described."""
        return cls(content["precision"], Evaluation.from_dict(content["evaluation"]), content["is_own"])


@dataclass(frozen=True)
class GivenMeasurements:
    """Measurements of the user's network as loaded.

    Args:
        question: key of the study, to reuse them only for the same one.
        network: fingerprint of the weights and the images.
        spent: seconds per batch of each reference.
        forms: digests of the file in each precision, without the names in it; see `nameless_digest`.
        simple: the network in each precision.
    """

    question: str
    network: str
    spent: Mapping[str, Spent]
    forms: Mapping[str, str]
    simple: tuple[SimpleVersion, ...]

    def of(self, precision: str) -> Evaluation:
        """Returns the evaluation in one precision."""
        return next(version.evaluation for version in self.simple if version.precision == precision)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return {
            "question": self.question,
            "network": self.network,
            "spent": {name: asdict(spent) for name, spent in self.spent.items()},
            "forms": dict(self.forms),
            "simple": [version.to_dict() for version in self.simple],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the record that `to_dict` described."""
        return cls(
            question=content["question"],
            network=content["network"],
            spent={name: Spent(**spent) for name, spent in content["spent"].items()},
            forms=content["forms"],
            simple=tuple(SimpleVersion.from_dict(version) for version in content["simple"]),
        )
