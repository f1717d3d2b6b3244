"""Exports torch networks to ONNX, once per network."""

import copy
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from spaces.dynamic.exit_network import ExitNetwork, layer_name
from spaces.errors import UserError

OPSET = 17
INPUT = "images"
OUTPUT = "logits"


class ExportError(UserError):
    """A network that cannot be written as ONNX."""


class _WithCuts(nn.Module):
    """Returns the features at each cut point with the exit's logits, and each block's ends with the gate's logits.

    After the network's own logits come the ends of blocks that can be left out.
    """

    def __init__(self, network: ExitNetwork, removable: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._removable = tuple(removable)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with _watched(self.network.trunk, self._removable) as ends:
            features, blocks, logits = self.network.observe(images)
        outputs: list[Tensor] = []
        for head, feature in zip(self.network.exits.values(), features, strict=True):
            outputs += [feature, head(feature)]
        for gate, (source, result) in zip(self.network.gates.values(), blocks, strict=True):
            outputs += [source, gate(source), result]
        return (*outputs, logits, *(tensor for block in self._removable for tensor in ends[block]))


@contextmanager
def _watched(trunk: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Notes the input and output of blocks, by path, while the trunk runs."""
    ends: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        trunk.get_submodule(block).register_forward_hook(
            lambda _module, args, out, block=block: ends.update({block: (args[0], out)})
        )
        for block in blocks
    ]
    try:
        yield ends
    finally:
        for hook in hooks:
            hook.remove()


def cut_name(exit_name: str) -> str:
    """Returns the name of the tensor that an exit's head reads."""
    return f"{exit_name}_features"


def logits_name(exit_name: str) -> str:
    """Returns the name of an exit's output."""
    return f"{exit_name}_logits"


def block_ends(block: str) -> tuple[str, str]:
    """Returns the names of the input and output tensors of a block with a gate."""
    return f"{block}/source", f"{block}/result"


def gate_logits_name(block: str) -> str:
    """Returns the name of the output of a block's gate."""
    return f"skip.{block}_logits"


def export_structure(
    network: ExitNetwork, image: Tensor, removable: Sequence[str] = ()
) -> tuple[onnx.ModelProto, dict[str, tuple[str, str]]]:
    """Returns the network's graph, and the input and output tensor of each block that can be left out.

    The graph's initializers have the names of the state dict, but random values.

    Batch normalisation stays a node, and the batch size is dynamic. Values are random because the exporter merges
    tensors of equal content, which would tie layers whose weights happen to be equal.

    Args:
        network: in evaluation mode.
        image: one input, `(1, c, h, w)`.
        removable: paths of blocks that can be left out.

    Raises:
        ExportError: torch cannot export it; the message has torch's reason.
    """
    names = [name for exit_name in network.exit_names for name in (cut_name(exit_name), logits_name(exit_name))]
    for block in network.skip_blocks:
        source, result = block_ends(block)
        names += [source, gate_logits_name(block), result]
    names += [OUTPUT, *(name for block in removable for name in _watched_ends(block))]
    randomized = _with_random_values(network)
    try:
        model = _export(_WithCuts(randomized, removable), (image,), names)
    except Exception as error:
        path, reason = _unexportable_module(randomized, image) or ("", error)
        is_inner = path not in ("", "trunk")
        location = f" at {layer_name(path)!r} ({type(network.get_submodule(path)).__name__})" if is_inner else ""
        raise ExportError(f"the network cannot be exported to ONNX{location}: {_first_line(reason)}") from error
    _strip_prefix(model, "network.")
    return model, {block: _unwatched(model, _watched_ends(block)) for block in removable}


def _watched_ends(block: str) -> tuple[str, str]:
    return f"{block}/before", f"{block}/after"


def _unwatched(model: onnx.ModelProto, ends: tuple[str, str]) -> tuple[str, str]:
    """Returns the names that two outputs have without being outputs, and makes them none of the model's, in place."""
    source, result = (_own_name(model, name) for name in ends)
    return source, result


def _own_name(model: onnx.ModelProto, name: str) -> str:
    node = next(node for node in model.graph.node if name in node.output)
    output = next(info for info in model.graph.output if info.name == name)
    model.graph.output.remove(output)
    is_alias = node.op_type == "Identity"
    own = node.input[0] if is_alias else f"{node.name}_output_{list(node.output).index(name)}"
    if is_alias:
        model.graph.node.remove(node)
    for each in model.graph.node:
        each.input[:] = [own if read == name else read for read in each.input]
        each.output[:] = [own if written == name else written for written in each.output]
    return own


def _export(module: nn.Module, inputs: tuple[Any, ...], outputs: Sequence[str] = ()) -> onnx.ModelProto:
    """Returns a module's graph; with a dynamic batch size if its outputs are named."""
    file = io.BytesIO()
    with warnings.catch_warnings(), _any_pooling(), _quiet():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            cast(Any, file),
            opset_version=OPSET,
            dynamo=False,  # 15 to 20 times faster than the new exporter, and keeps the state dict's names
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            input_names=[INPUT] if outputs else None,
            output_names=list(outputs) or None,
            dynamic_axes={name: {0: "batch"} for name in [INPUT, *outputs]} if outputs else None,
        )
    return onnx.load_from_string(file.getvalue())


@contextmanager
def _any_pooling() -> Iterator[None]:
    """Makes adaptive pooling exportable at any size.

    The exporter does not know sizes after a padding or a slice. So equal bins are exported as plain pooling, and
    unequal ones as a product with constant matrices.
    """
    original = F.adaptive_avg_pool2d

    def pool(features: Tensor, output_size: Any) -> Tensor:
        height, width = (
            int(output or size) for output, size in zip(_pair(output_size), features.shape[-2:], strict=True)
        )
        if (height, width) == (1, 1):
            return original(features, output_size)
        if features.shape[-2] % height == 0 and features.shape[-1] % width == 0:
            return F.avg_pool2d(features, (int(features.shape[-2]) // height, int(features.shape[-1]) // width))
        rows, columns = _bins(int(features.shape[-2]), height), _bins(int(features.shape[-1]), width)
        return torch.matmul(torch.matmul(rows, features), columns.T)

    F.adaptive_avg_pool2d = cast(Any, pool)
    try:
        yield
    finally:
        F.adaptive_avg_pool2d = original


def _bins(size: int, bins: int) -> Tensor:
    """Returns the share of each of `size` positions in each bin of adaptive average pooling, `(bins, size)`."""
    return F.adaptive_avg_pool1d(torch.eye(size), bins).T.contiguous()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter from printing the whole graph on failure; it turns its own log switch on by itself."""
    original = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = original


def _unexportable_module(network: nn.Module, image: Tensor) -> tuple[str, Exception] | None:
    """Returns the path of the innermost module that cannot be exported by itself, and the exporter's reason."""
    inputs: dict[str, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, path=path: inputs.setdefault(path, args) and None)
        for path, module in network.named_modules()
    ]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    failure: tuple[str, Exception] | None = None
    todo = [name for name, _ in network.named_children()]
    while todo:
        path = todo.pop(0)
        error = _failure(network, path, inputs)
        if error is not None:
            failure = path, error
            todo = [f"{path}.{name}" for name, _ in network.get_submodule(path).named_children()]
    return failure


def _failure(network: nn.Module, path: str, inputs: Mapping[str, tuple[Any, ...]]) -> Exception | None:
    """Returns why a module cannot be exported by itself; for a container that is never called, why a part cannot."""
    module = network.get_submodule(path)
    if path not in inputs:
        failures = (_failure(network, f"{path}.{name}", inputs) for name, _ in module.named_children())
        return next((failure for failure in failures if failure is not None), None)
    try:
        _export(module, inputs[path])
    except Exception as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].partition("  [Caused by")[0] if lines else type(error).__name__


def _with_random_values(network: ExitNetwork) -> ExitNetwork:
    randomized = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(0)
    state = randomized.state_dict()
    for name, tensor in [*randomized.named_parameters(), *randomized.named_buffers()]:
        if name in state and tensor.is_floating_point():  # other buffers are constants of the graph, with their values
            tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
    return randomized


def _strip_prefix(model: onnx.ModelProto, prefix: str) -> None:
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.removeprefix(prefix)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = name.removeprefix(prefix)
