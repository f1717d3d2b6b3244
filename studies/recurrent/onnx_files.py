"""The ONNX files of a recurrent network: one step, what a state says, or a whole sequence at once.

Every tensor has the three dimensions of ONNX's GRU, `(steps, 1, values)`, so that no file has to reshape any.
"""

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from evaluators.graph.exporter import OPSET
from studies.recurrent.gru import GruClassifier
from studies.recurrent.skip_predictor import SkipPredictor
from studies.recurrent.skip_rnn import SkipGruClassifier

_IR_VERSION = 8
"""The one that came with the operator set."""


class _File:
    """Nodes, and the values that they need."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.values: list[TensorProto] = []

    def gru(self, cell: nn.GRUCell, inputs: str, state: str, output: str) -> None:
        """Adds a GRU whose last state is `output`."""
        size = cell.hidden_size
        self._value("input_weights", _gates_in_order(cell.weight_ih)[None])
        self._value("state_weights", _gates_in_order(cell.weight_hh)[None])
        biases = [_gates_in_order(cell.bias_ih), _gates_in_order(cell.bias_hh)]
        self._value("biases", np.concatenate(biases)[None])
        given = [inputs, "input_weights", "state_weights", "biases", "", state]
        self.nodes.append(helper.make_node("GRU", given, ["", output], hidden_size=size, linear_before_reset=1))

    def linear(self, layer: nn.Linear, source: str, output: str) -> None:
        """Adds a linear layer."""
        self._value(f"{output}/weight", _numpy(layer.weight).T)
        self._value(f"{output}/bias", _numpy(layer.bias))
        self.nodes.append(helper.make_node("MatMul", [source, f"{output}/weight"], [f"{output}/product"]))
        self.nodes.append(helper.make_node("Add", [f"{output}/product", f"{output}/bias"], [output]))

    def apply(self, operator: str, source: str, output: str) -> None:
        """Adds a node of one input."""
        self.nodes.append(helper.make_node(operator, [source], [output]))

    def written(self, inputs: dict[str, tuple[int, int]], outputs: dict[str, int]) -> bytes:
        """Returns the file, of inputs told by steps and values and outputs told by values."""
        given = [_tensor(name, steps, values) for name, (steps, values) in inputs.items()]
        found = [_tensor(name, 1, values) for name, values in outputs.items()]
        graph = helper.make_graph(self.nodes, "recurrent", given, found, self.values)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))

    def _value(self, name: str, array: np.ndarray) -> None:
        self.values.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))


def step_file(cell: nn.GRUCell) -> bytes:
    """Returns one step of a GRU: `inputs` and `state` to `next`."""
    file = _File()
    file.gru(cell, "inputs", "state", "next")
    return file.written(_step_inputs(cell), {"next": cell.hidden_size})


def skip_step_file(network: SkipGruClassifier) -> bytes:
    """Returns one update of a Skip RNN: `inputs` and `state` to `next` and `increment`, a probability."""
    cell, file = network.skip.cell, _File()
    file.gru(cell, "inputs", "state", "next")
    file.linear(network.skip.due, "next", "due")
    file.apply("Sigmoid", "due", "increment")
    return file.written(_step_inputs(cell), {"next": cell.hidden_size, "increment": 1})


def head_file(head: nn.Linear) -> bytes:
    """Returns the last layer alone: `state` to `logits`."""
    file = _File()
    file.linear(head, "state", "logits")
    return file.written({"state": (1, head.in_features)}, {"logits": head.out_features})


def predictor_file(predictor: SkipPredictor, cell: nn.GRUCell) -> bytes:
    """Returns a predictor: `inputs` and `state` to `skippable`, a probability."""
    file = _File()
    file.nodes.append(helper.make_node("Concat", ["inputs", "state"], ["both"], axis=2))
    file.linear(predictor.first, "both", "first")
    file.apply("Relu", "first", "first/active")
    file.linear(predictor.second, "first/active", "second")
    file.apply("Relu", "second", "second/active")
    file.linear(predictor.last, "second/active", "last")
    file.apply("Sigmoid", "last", "skippable")
    return file.written(_step_inputs(cell), {"skippable": 1})


def whole_file(network: GruClassifier, steps: int) -> bytes:
    """Returns the whole network for sequences of so many steps: `inputs` to `logits`."""
    file = _File()
    file.gru(network.cell, "inputs", "", "state")
    file.linear(network.head, "state", "logits")
    return file.written({"inputs": (steps, network.cell.input_size)}, {"logits": network.head.out_features})


def _step_inputs(cell: nn.GRUCell) -> dict[str, tuple[int, int]]:
    return {"inputs": (1, cell.input_size), "state": (1, cell.hidden_size)}


def _tensor(name: str, steps: int, values: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [steps, 1, values])


def _gates_in_order(weights: Tensor) -> np.ndarray:
    """Returns a GRU's weights or biases with the gates as ONNX has them: torch begins with the reset gate."""
    reset, update, new = np.split(_numpy(weights), 3)
    return np.concatenate([update, reset, new])


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy()
    return array
