"""The dense network in each of the target's precisions: what candidates are timed beside."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from evaluators.artifact import Artifact
from evaluators.artifact_builder import ArtifactBuilder
from evaluators.data import Splits
from evaluators.graph.digest import nameless_digest
from evaluators.latency.evaluator import LatencyEvaluator
from evaluators.runtimes.base import Runtime, Spent, Target
from search.pipeline.given_network import latency_evaluator, time_references
from spaces.dynamic.exit_network import ExitNetwork
from spaces.joint import JointSpace


@dataclass(frozen=True)
class References:
    """The references of a search, by precision.

    Args:
        builder: writes their files.
        network: dense, with its exits.
        space: whose precisions they have.
        runtime: runs them.
        target: batch size and threads.
        data: whose validation images they are timed on.
    """

    builder: ArtifactBuilder
    network: ExitNetwork
    space: JointSpace
    runtime: Runtime
    target: Target
    data: Splits

    @cached_property
    def artifacts(self) -> Mapping[str, Artifact]:
        """The files of each reference."""
        dense = self.space.dense()
        return {
            precision: self.builder.build(
                self.network, replace(dense, precision=dict.fromkeys(dense.precision, precision))
            )
            for precision in self.space.precision.precisions
        }

    def have_forms(self, forms: Mapping[str, str]) -> bool:
        """Returns whether the references are files of these forms, see `nameless_digest`, by precision."""
        return {name: nameless_digest(artifact.deployed[0]) for name, artifact in self.artifacts.items()} == dict(forms)

    def time(self) -> dict[str, Spent]:
        """Returns what each reference takes for its batch, medians in seconds, timed side by side."""
        return time_references(self.artifacts, self.runtime, self.target, self.data)

    def latency_evaluator(self, seconds: Mapping[str, float]) -> LatencyEvaluator:
        """Returns the evaluator that tells latencies at the speed which the references had.

        Args:
            seconds: that each reference took for its batch when the search began.
        """
        return latency_evaluator(self.artifacts, seconds, self.runtime, self.target)
