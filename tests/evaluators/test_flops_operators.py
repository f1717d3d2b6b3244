"""FLOPs of operators that fvcore does not know, against their formulas."""

import pytest
import torch
from torch import Tensor, nn

from evaluators.flops.evaluator import count_by_module
from evaluators.flops.operators import not_counted


def flops(network: nn.Module, *shape: int) -> float:
    return sum(count_by_module(network.eval(), torch.zeros(*shape)).values())


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x[..., :3, :], x[..., :3, :2])


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(x, x, x).sum() + torch.mv(x[0], x[0, 0])


class Distance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x).abs().sigmoid_()


@pytest.mark.parametrize(("padding", "side"), [("same", 8), ("valid", 6), (1, 8), (0, 6)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_the_same_however_its_padding_is_written(
    padding: str | int, side: int, groups: int
) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=padding, groups=groups)
    assert flops(layer, 1, 4, 8, 8) == side * side * 6 * (4 // groups) * 9


def test_one_dimension_and_dilation_count_too() -> None:
    assert flops(nn.Conv1d(4, 6, 3, padding="same", dilation=2), 1, 4, 10) == 10 * 6 * 4 * 3


def test_attention_counts_both_of_its_products() -> None:
    assert flops(Attention(), 2, 5, 7, 4) == 2 * 5 * (7 * 3 * 4 + 7 * 3 * 2)


def test_sums_with_products_count_the_products() -> None:
    assert flops(Products(), 1, 4, 4) == 4 * 4 * 4 + 4 * 4


@pytest.mark.parametrize(
    "layer", [nn.LSTM(3, 5, 2, batch_first=True), nn.GRU(3, 5, bidirectional=True), nn.RNN(3, 5, nonlinearity="relu")]
)
def test_recurrent_layers_count_each_matrix_once_a_step(layer: nn.Module) -> None:
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    assert flops(layer, 2, 7, 3) == 2 * 7 * matrices


def test_what_nobody_counts_is_named() -> None:
    assert not_counted(Distance().eval(), torch.zeros(1, 4, 3)) == {"aten::cdist": 1}
    assert (
        not_counted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Dropout()).eval(), torch.zeros(1, 3, 8, 8))
        == {}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_32", "swin_t", "mobilenet_v3_small", "convnext_tiny", "shufflenet_v2_x0_5"])
def test_nothing_of_torchvision_is_left_out(name: str) -> None:
    import torchvision

    network = torchvision.models.get_model(name, weights=None).eval()
    image = torch.zeros(1, 3, 224, 224)
    assert not_counted(network, image) == {}
    published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"]
    convolutions = sum(count_by_module(network, image).values())
    assert convolutions / 1e9 == pytest.approx(published, rel=0.05, abs=0.005)
