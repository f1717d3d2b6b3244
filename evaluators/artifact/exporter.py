"""The one place that turns torch into ONNX, once per network."""

import copy
import io
import warnings
from typing import Any, cast

import onnx
import torch
from torch import Tensor, nn

from spaces.errors import UserError
from spaces.network import ExitNetwork

OPSET = 17
INPUT = "images"
OUTPUT = "logits"


class ExportError(UserError):
    """A network that cannot be written as ONNX."""


class _WithCuts(nn.Module):
    """Returns the features at each cut point beside the logits of its exit."""

    def __init__(self, network: ExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, logits = self.network.run_trunk(images)
        outputs: list[Tensor] = []
        for head, feature in zip(self.network.exits.values(), features, strict=True):
            outputs += [feature, head(feature)]
        return (*outputs, logits)


def cut_name(exit_name: str) -> str:
    """Returns the name of the tensor that an exit's head reads."""
    return f"{exit_name}_features"


def logits_name(exit_name: str) -> str:
    """Returns the name of an exit's output."""
    return f"{exit_name}_logits"


def export_structure(network: ExitNetwork, image: Tensor) -> onnx.ModelProto:
    """Returns the network's graph, whose initializers carry the names of its state dict but not its values.

    Batch normalisation stays a node, the batch size is free. Values are random: the exporter merges tensors of equal
    content, which would tie layers together that only happen to be equal today.

    Args:
        network: in evaluation mode.
        image: one input, `(1, c, h, w)`.

    Raises:
        ExportError: torch cannot export it; the reason is passed on.
    """
    names = [name for exit_name in network.exit_names for name in (cut_name(exit_name), logits_name(exit_name))]
    names.append(OUTPUT)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                _WithCuts(_scrambled(network)),
                (image,),
                cast(Any, file),
                opset_version=OPSET,
                dynamo=False,  # 15 to 20 times faster than the new exporter, and keeps the state dict's names
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
                input_names=[INPUT],
                output_names=names,
                dynamic_axes={name: {0: "batch"} for name in [INPUT, *names]},
            )
        except Exception as error:
            raise ExportError(f"the network cannot be exported to ONNX: {error}") from error
    model = onnx.load_from_string(file.getvalue())
    _strip_prefix(model, "network.")
    return model


def _scrambled(network: ExitNetwork) -> ExitNetwork:
    scrambled = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*scrambled.parameters(), *scrambled.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return scrambled


def _strip_prefix(model: onnx.ModelProto, prefix: str) -> None:
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.removeprefix(prefix)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = name.removeprefix(prefix)
