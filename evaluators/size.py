"""How large the deployed artifact is."""

from evaluators.measurement import Measurement
from evaluators.subject import Deployed, Subject


class SizeEvaluator:
    """Bytes on disk of the files that are deployed."""

    metric = "size"

    def measure(self, subject: Deployed) -> Measurement:
        """Returns the size of all stages together, in bytes."""
        size = subject.artifact.size
        protocol = f"bytes of {len(subject.artifact.deployed)} ONNX file(s) as the runtime loads them"
        return Measurement("size", size, "total", 1, 0.0, str(subject.target), protocol)


class ParamsEvaluator:
    """Weights of the network, heads of active exits included."""

    metric = "params"

    def measure(self, subject: Subject) -> Measurement:
        """Returns the number of trainable values that the deployed version has."""
        inactive = [name for name in subject.network.exit_names if name not in subject.candidate.active_exits]
        deployed = [
            parameter
            for name, parameter in subject.network.named_parameters()
            if not any(name.startswith(f"exits.{exit_name}.") for exit_name in inactive)
        ]
        count = sum(parameter.numel() for parameter in deployed)
        protocol = "trainable values of the compressed network, zeros included"
        nonzero = sum(int(parameter.count_nonzero()) for parameter in deployed) / count
        notes = {"nonzero": nonzero} if subject.candidate.patterns else {}
        return Measurement("params", count, "total", 1, 0.0, "any", protocol, notes=notes)
