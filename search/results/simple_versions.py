"""The network as it is in each precision, with every channel and without exits: what a search has to beat."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from evaluators.runtimes.base import Spent
from search.results.evaluation import Evaluation

_GIVEN = "given-"


@dataclass(frozen=True)
class SimpleVersion:
    """One simple version, measured in full whatever limit it breaks.

    Args:
        precision: of all of its layers that can have it.
        evaluation: what was measured.
        is_own: whether the search's own network makes this file; else the network as it was given does, before exits,
            gates or masks changed its weights, or before a training that feels int8.
    """

    precision: str
    evaluation: Evaluation
    is_own: bool = True

    @property
    def name(self) -> str:
        """What it is called in front of users: `int8`, or `given-int8` where the search's own is another."""
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
    """What was measured of the network before anything was added to it.

    Args:
        question: the key of the study that asked.
        network: the fingerprint of its weights and of the images.
        spent: what each reference took for its batch.
        forms: of the file in each precision, but for the names in it.
        simple: the network in each precision.
    """

    question: str
    network: str
    spent: Mapping[str, Spent]
    forms: Mapping[str, str]
    simple: tuple[SimpleVersion, ...]

    def of(self, precision: str) -> Evaluation:
        """Returns what was measured in one precision."""
        return next(each.evaluation for each in self.simple if each.precision == precision)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready copy."""
        return {
            "question": self.question,
            "network": self.network,
            "spent": {name: asdict(spent) for name, spent in self.spent.items()},
            "forms": dict(self.forms),
            "simple": [each.to_dict() for each in self.simple],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the record that `to_dict` described."""
        return cls(
            question=content["question"],
            network=content["network"],
            spent={name: Spent(**spent) for name, spent in content["spent"].items()},
            forms=content["forms"],
            simple=tuple(SimpleVersion.from_dict(each) for each in content["simple"]),
        )
