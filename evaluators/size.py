"""Size of the deployed files, and number of parameters."""

from evaluators.deployed import DeployedCandidate, LoadedArtifact
from evaluators.measurement import Measurement


class SizeEvaluator:
    """Size of the deployed files, in bytes on disk."""

    metric = "size"

    def measure(self, subject: LoadedArtifact) -> Measurement:
        """Returns the total size of all stages, in bytes."""
        count = len(subject.artifact.deployed)
        protocol = f"bytes of {count} ONNX file{'s' if count > 1 else ''} as the runtime loads them"
        return Measurement("size", subject.artifact.size, "total", 1, 0.0, str(subject.target), protocol)


class ParamsEvaluator:
    """Number of parameters, including the heads of active exits and the gates of skippable blocks."""

    metric = "params"

    def measure(self, subject: DeployedCandidate) -> Measurement:
        """Returns the number of trainable parameters of the deployed version."""
        inactive = [f"exits.{name}." for name in subject.network.exit_names if name not in subject.artifact.exits]
        inactive += [f"skips.{block}." for block in subject.network.skip_blocks if block not in subject.artifact.blocks]
        deployed = [
            parameter for name, parameter in subject.network.named_parameters() if not name.startswith(tuple(inactive))
        ]
        count = sum(parameter.numel() for parameter in deployed)
        protocol = "trainable values of the compressed network, zeros included"
        nonzero = sum(int(parameter.count_nonzero()) for parameter in deployed) / count
        notes = {"nonzero": nonzero} if subject.candidate.patterns else {}
        return Measurement("params", count, "total", 1, 0.0, "any", protocol, notes=notes)
