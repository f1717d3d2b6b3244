"""The methods of fake quantization: their papers' formulas, and the grids that they leave."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evaluators.quantization.int8 import quantize_weight
from search.config.registries import QUANTIZERS
from search.recovery.quantizers.dorefa import DoReFaActivation, DoReFaWeight
from search.recovery.quantizers.grid import LargestScaled, rounded
from search.recovery.quantizers.lsq import LsqActivation, LsqWeight, gradient_scale
from search.recovery.quantizers.pact import PactActivation


def gradients(values: torch.Tensor, step: torch.Tensor, low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, step = values.clone().requires_grad_(), step.clone().requires_grad_()
    rounded(values, step, low, high).sum().backward()
    return values.grad, step.grad


class TestFormulas:
    @settings(max_examples=100, deadline=None)
    @given(st.floats(-300, 300), st.floats(0.01, 10))
    def test_lsq_is_the_papers_equations_on_scalars(self, value: float, step: float) -> None:
        ratio = float(np.float32(value) / np.float32(step))
        assume(min(abs(ratio + 128), abs(ratio - 127), abs(ratio % 1 - 0.5)) > 1e-3)  # at an edge both sides are right
        whole = round(min(max(ratio, -128), 127))
        inside = -128 < ratio < 127
        value32, step32 = torch.tensor([value]), torch.tensor(step)
        assert rounded(value32, step32, -128, 127).item() == pytest.approx(whole * step, rel=1e-5, abs=1e-6)
        to_value, to_step = gradients(value32, step32, -128, 127)
        assert to_value.item() == inside
        assert to_step.item() == pytest.approx(whole - ratio if inside else whole, rel=1e-3, abs=1e-3)

    def test_lsq_scales_a_steps_gradient_by_how_many_share_it(self) -> None:
        assert gradient_scale(1000, 127) == pytest.approx(1 / math.sqrt(1000 * 127))
        features = torch.rand(4, 3, 5, 5) * 10
        quantizer = LsqActivation(0.0, 5.0)
        quantizer(features).sum().backward()
        _, plain = gradients(features, torch.tensor(5.0 / 127), -128, 127)
        assert quantizer.size.grad.item() == pytest.approx(plain.item() / math.sqrt(75 * 127), rel=1e-5)
        weight = torch.randn(6, 3, 2, 2)
        steps = LsqWeight(weight, 0, 127, per_channel=True)
        (steps(weight) * torch.arange(6.0).view(-1, 1, 1, 1)).sum().backward()
        assert steps.size.grad.shape == (6, 1, 1, 1)
        _, plain = gradients(weight[5], steps.size.detach()[5], -127, 127)
        assert steps.size.grad[5].item() == pytest.approx(5 * plain.item() / math.sqrt(12 * 127), rel=1e-4, abs=1e-6)

    def test_pact_is_the_papers_equations(self) -> None:
        quantizer = PactActivation(0.0, 6.0)
        features = torch.tensor([0.3, 5.9, 6.1, 100.0], requires_grad=True)
        answer = quantizer(features)
        x, alpha = features.detach(), 6.0
        clipped = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
        assert torch.allclose(answer, torch.round(clipped * 127 / alpha) * alpha / 127)
        answer.backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        assert features.grad.tolist() == [1.0, 2.0, 0.0, 0.0]
        assert quantizer.alpha.grad.item() == 12.0, "the edge learns from what is clipped, and from nothing else"

    def test_dorefa_is_the_papers_equations(self) -> None:
        weight = torch.randn(3, 4, 2, 2)
        quantizer = DoReFaWeight(weight, 0, 127, per_channel=False)
        largest = weight.abs().max()
        squeezed = torch.tanh(weight / largest)
        ratio = squeezed / (2 * squeezed.abs().max()) + 0.5
        expected = largest * (2 * torch.round(254 * ratio) / 254 - 1)  # equation 9 with 254 steps
        assert torch.allclose(quantizer(weight), expected, atol=1e-6)
        clip = DoReFaActivation(0.0, 2.0)
        features = torch.tensor([0.5, 3.0], requires_grad=True)
        clip(features).sum().backward()
        assert torch.allclose(clip(features), torch.tensor([32 * 2 / 127, 2.0]))
        assert features.grad.tolist() == [1.0, 0.0]

    def test_dorefa_begins_with_the_weights_as_they_were(self) -> None:
        weight = torch.randn(3, 4, 2, 2)
        quantizer = DoReFaWeight(weight, 0, 127, per_channel=True)
        plain = LargestScaled(weight, 0, 127, per_channel=True)
        assert (quantizer(quantizer.start(weight)) - plain(weight)).abs().max() <= plain.step(weight).max() * 1.001


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(QUANTIZERS)),
    axis=st.sampled_from([0, 1]),
    limit=st.sampled_from([127, 63]),
    per_channel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_grid_holds_the_rounded_weight(name: str, axis: int, limit: int, per_channel: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(4, 6) * torch.tensor([1.0, 0.1, 5.0, 0.0]).view(-1, 1)
    quantizer = QUANTIZERS[name]().weight(weight, axis, limit, per_channel)
    begun = quantizer.start(weight)
    grid = quantizer.grid(begun)
    shape = (-1, 1) if axis == 0 else (1, -1)
    assert grid.values.dtype == np.int8
    assert np.abs(grid.values.astype(int)).max() == limit
    assert (grid.scale > 0).all()
    assert grid.scale.shape == (weight.shape[axis],)
    np.testing.assert_allclose(grid.values * grid.scale.reshape(shape), quantizer(begun).detach(), atol=1e-6)
    plain = quantize_weight(weight.numpy(), axis, limit, per_channel)
    np.testing.assert_allclose(grid.scale, plain.scale, rtol=1e-6)
    assert np.abs(grid.values.astype(int) - plain.values).max() <= 1, "training begins where rounding ends"
