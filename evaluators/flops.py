"""FLOPs as fvcore counts them: one fused multiply-add is one flop, batch normalisation and pooling are counted."""

import logging
import warnings
from collections.abc import Mapping

import torch
from fvcore.nn import FlopCountAnalysis

from evaluators.measurement import Measurement
from evaluators.subject import Subject
from spaces.network import ExitNetwork

_PROTOCOL = "fvcore, one fused multiply-add is one flop, per image"


class FlopsEvaluator:
    """FLOPs per image, as expected over the validation images where some leave early.

    Args:
        network: the dense network with its exits.
        image: one input, `(1, c, h, w)`.
    """

    metric = "flops"

    def __init__(self, network: ExitNetwork, image: torch.Tensor) -> None:
        self._image = image
        self._stage_of = _stages(network, image)
        self._counts: dict[tuple[tuple[str, int], ...], Mapping[str, float]] = {}

    def measure(self, subject: Subject) -> Measurement:
        """Returns the FLOPs of each stage times the share of images that reaches it, and the longest path's beside."""
        counts, active = self._by_module(subject), subject.candidate.active_exits
        stages = self.stages(subject)
        reached = subject.answers.reached if active else (1.0,)
        expected = sum(share * flops for share, flops in zip(reached, stages, strict=True))
        n = len(subject.validation) if active else 1
        others = {"worst": sum(stages)}
        notes = {"nonzero": self._nonzero(subject, counts)} if subject.candidate.patterns else {}
        return Measurement("flops", expected, "expected", n, 0.0, "any", _PROTOCOL, others, notes)

    def stages(self, subject: Subject) -> list[float]:
        """Returns the FLOPs of each stage of the deployed version, heads included."""
        active = subject.candidate.active_exits
        stages = [0.0] * (len(active) + 1)
        for path, count in self._by_module(subject).items():
            owner = path.split(".")[1] if path.startswith("exits.") else ""
            if not owner or owner in active:
                stages[self._stage(path, active, subject.network.exit_names)] += count
        return stages

    def heads(self, subject: Subject) -> list[float]:
        """Returns the FLOPs of the head of each active exit."""
        counts = self._by_module(subject)
        return [
            sum(count for path, count in counts.items() if path.startswith(f"exits.{name}."))
            for name in subject.candidate.active_exits
        ]

    def exits_before(self, path: str) -> int:
        """Returns how many exits lie before a module of the trunk."""
        return self._stage_of.get(path, 0)

    def _nonzero(self, subject: Subject, counts: Mapping[str, float]) -> float:
        """Returns the share of the trunk's FLOPs that multiply by a weight other than zero."""
        weights = dict(subject.network.named_parameters())
        trunk = {path: count for path, count in counts.items() if not path.startswith("exits.")}
        left = sum(
            count * (float((weights[f"{path}.weight"] != 0).float().mean()) if f"{path}.weight" in weights else 1.0)
            for path, count in trunk.items()
        )
        return left / sum(trunk.values())

    def _stage(self, path: str, active: tuple[str, ...], exits: tuple[str, ...]) -> int:
        """Returns the stage that a module runs in, when only the `active` exits cut the network."""
        depth = self._stage_of.get(path, len(exits))
        return sum(1 for name in active if exits.index(name) < depth)

    def _by_module(self, subject: Subject) -> Mapping[str, float]:
        key = tuple(sorted(subject.candidate.channels.items()))
        if key not in self._counts:
            self._counts[key] = count_by_module(subject.network, self._image)
        return self._counts[key]


def count_by_module(network: torch.nn.Module, image: torch.Tensor) -> dict[str, float]:
    """Returns the FLOPs of each module without its children, for one image; `""` is the network's own."""
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        totals = FlopCountAnalysis(network, image).unsupported_ops_warnings(False).by_module()
    own = {}
    for path, module in network.named_modules():
        children = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
        own[path] = float(totals[path] - sum(totals[child] for child in children))
    return {path: count for path, count in own.items() if count}


def _stages(network: ExitNetwork, image: torch.Tensor) -> dict[str, int]:
    """Returns, for each module, how many cut points lie before it: the stage that it runs in when every exit is on."""
    order: dict[str, int] = {}
    passed = 0

    def start(path: str) -> None:
        order.setdefault(path, passed)

    def finish() -> None:
        nonlocal passed
        passed += 1

    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: start(path))
        for path, module in network.named_modules()
    ]
    hooks += [
        network.trunk.get_submodule(path).register_forward_hook(lambda _module, _args, _out: finish())
        for path in network.cut_points
    ]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    # Parents that span several stages start in the first; what they compute themselves comes after their children.
    order |= {path: passed for path, module in network.named_modules() if any(True for _ in module.children())}
    heads = {name: index for index, name in enumerate(network.exit_names)}
    return {path: heads[path.split(".")[1]] if path.startswith("exits.") else depth for path, depth in order.items()}
