"""Networks as factories return them: frozen, wrapped, lazy, or with weights that are computed from others."""

import copy
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from evaluators.data import LabelledImages
from search.config.progress import Say
from search.config.study import ModelSection, TrainingSection
from search.loading.models import BuiltModel, build_model
from search.loading.user_code import UserCodeError
from search.training.dense import train
from search.training.loop import NoGradientError
from spaces.dynamic.exit_network import ExitNetwork
from spaces.pruning.prunable import find_groups
from spaces.pruning.slicing import sliced

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


def build(factory: Callable[[], nn.Module], weights: Path | None = None, say: Say = lambda _: None) -> BuiltModel:
    section = ModelSection(source=f"{__name__}:{factory.__name__}")
    return build_model(section, weights, 4, 0, lambda: IMAGES, say)


def own(num_classes: int = 4) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


FROZEN = own().requires_grad_(False)


def frozen() -> nn.Module:
    return FROZEN


def switched_off() -> nn.Module:
    torch.set_grad_enabled(False)
    return own()


def inferred() -> nn.Module:
    with torch.inference_mode():
        return own()


@pytest.mark.parametrize("factory", [frozen, switched_off, inferred])
def test_every_weight_is_trained_however_it_comes(factory, tmp_path) -> None:
    said: list[str] = []
    built = build(factory, say=said.append)
    before = {name: weight.detach().clone() for name, weight in built.network.named_parameters()}
    images = np.random.default_rng(0).normal(size=(32, 3, 8, 8)).astype(np.float32)
    data = LabelledImages(images, np.arange(32) % 4)
    settings = TrainingSection(epochs=1, batch=16, learning_rate=0.1)
    train(built.network, data, settings, None, tmp_path / "partial.pt", lambda *_: None)
    assert all(not torch.equal(weight, before[name]) for name, weight in built.network.named_parameters())
    assert not any(weight.requires_grad for weight in FROZEN.parameters()), "it was a copy"
    assert [text for text in said if "8 of the network's 8 parameters are frozen" in text] == said
    assert bool(said) == (factory is frozen)


def test_a_forward_without_gradients_is_not_trained_in_silence(tmp_path) -> None:
    class Still(nn.Sequential):
        @torch.no_grad()
        def forward(self, images):
            return super().forward(images)

    data = LabelledImages(np.zeros((16, 3, 8, 8), np.float32), np.arange(16) % 4)
    with pytest.raises(NoGradientError, match=r"take torch\.no_grad\(\) and detach\(\) out of it"):
        train(Still(own()), data, TrainingSection(epochs=1, batch=16), None, tmp_path / "part.pt", lambda *_: None)


def weight_normed() -> nn.Module:
    network = own()
    parametrizations.weight_norm(network[0])
    parametrizations.spectral_norm(network[3])
    parametrizations.orthogonal(network[7])
    return network


def older_normed() -> nn.Module:
    network = own()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(network[0])
        nn.utils.spectral_norm(network[3])
    prune.l1_unstructured(network[7], "weight", 0.5)
    return network


@pytest.mark.parametrize("factory", [weight_normed, older_normed])
def test_weights_that_are_computed_become_weights(factory, tmp_path) -> None:
    torch.manual_seed(1)
    given = factory().train()
    images = torch.randn(2, 3, 8, 8)
    given(images)
    torch.save(given.eval().state_dict(), tmp_path / "net.pt")
    said: list[str] = []
    built = build(factory, tmp_path / "net.pt", say=said.append)
    torch.testing.assert_close(built.network(images), given(images))
    assert "taken as they are, and trained as such" in said[0]
    for name in ("0.weight", "3.weight", "7.weight"):
        assert isinstance(built.network.get_parameter(name), nn.Parameter)
        assert name in said[0]
    assert {*built.network.state_dict()} == {*own().state_dict()}


def lazy(num_classes: int = 4) -> nn.Module:
    layers = [nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.LazyLinear(num_classes))


class Late(nn.Module):
    """Makes its last layer when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier: nn.Module | None = None

    def forward(self, images):
        features = images.mean((2, 3))
        if self.classifier is None:
            self.classifier = nn.Linear(features.shape[1], 4)
        return self.classifier(features)


@pytest.mark.parametrize("factory", [lazy, Late])
def test_layers_without_a_shape_get_their_weights(factory, tmp_path) -> None:
    network = factory().eval()
    network(torch.from_numpy(IMAGES))
    torch.save(network.state_dict(), tmp_path / "net.pt")
    built = build(factory, tmp_path / "net.pt")
    state = network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in built.network.state_dict().items())


def test_a_layer_without_a_shape_begins_anew_for_another_number_of_classes(tmp_path) -> None:
    network = lazy(7).eval()
    network(torch.from_numpy(IMAGES))
    torch.save(network.state_dict(), tmp_path / "net.pt")
    built = build(lazy, tmp_path / "net.pt")
    assert (built.fitted.renewed, built.fitted.had) == ("5", 7)


def scripted() -> nn.Module:
    return torch.jit.script(own().eval())


def traced_inside() -> nn.Module:
    network = own().eval()
    network[3] = torch.jit.trace(network[3], torch.zeros(1, 8, 8, 8))
    return network


class Uncopied(nn.Flatten):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Trained(nn.Flatten):
    def train(self, mode=True):
        raise NotImplementedError("no eval()")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is deprecated
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (scripted, "made of modules in Python, got a TorchScript module; return the network that was scripted"),
        (traced_inside, "a TorchScript module at '3'"),
        (Uncopied, "can be copied, got TypeError"),
        (Trained, r"has an evaluation mode, got .*no eval\(\)"),
    ],
)
def test_a_network_that_cannot_be_worked_on_is_one_line(factory, words) -> None:
    with pytest.raises(UserCodeError, match=words):
        build(factory)


def compiled() -> nn.Module:
    return torch.compile(nn.DataParallel(own()))


def test_wrappers_are_taken_off() -> None:
    assert {*build(compiled).network.state_dict()} == {*own().state_dict()}


class Auxiliary(nn.Module):
    """Runs a second classifier in training, as Inception does; `form` is how it returns both answers."""

    def __init__(self, form: Callable[..., object] = lambda logits, aux: (logits, aux)) -> None:
        super().__init__()
        self.form = form
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.aux, self.drop = nn.Linear(8, 4), nn.Dropout()
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        features = self.one(images)
        logits = self.fc(self.drop(self.two(features).mean((2, 3))))
        return self.form(logits, self.aux(features.mean((2, 3)))) if self.training else logits


class Inside(nn.Module):
    """Takes what it needs of an auxiliary network's answers, depending on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Auxiliary()

    def forward(self, images):
        answers = self.inner(images)
        return answers[0] if self.training else answers


class Dictionary(Auxiliary):
    def __init__(self) -> None:
        super().__init__(lambda logits, aux: {"out": logits, "aux": aux})


class Losing(Auxiliary):
    """Wants more than images in training."""

    def forward(self, images, labels=None):
        answers = super().forward(images)
        return nn.functional.cross_entropy(answers[0], labels) if self.training else answers


class Twice(Auxiliary):
    """Answers with more logits in training, from the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = self.fc

    def forward(self, images):
        answers = super().forward(images)
        return torch.cat(answers, 1) if self.training else answers


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (Auxiliary, "runs more (aux)"),
        (Inside, "runs more (inner.aux)"),
        (Dictionary, "runs more (aux)"),
        (Losing, "fails (TypeError: "),
        (Twice, "answers with a Tensor of another form"),
    ],
)
def test_versions_are_trained_as_they_are_deployed(factory, words) -> None:
    said: list[str] = []
    network = ExitNetwork(build(factory, say=said.append).network, [], []).eval()
    assert len(said) == 1
    assert f"In training mode the network {words}" in said[0]
    groups = find_groups(network, torch.from_numpy(IMAGES[:1]))
    smaller = sliced(network, groups.free, {group.name: np.arange(4) for group in groups.free}).train()
    before = copy.deepcopy(smaller.state_dict())
    answers = [smaller(torch.from_numpy(IMAGES))[-1] for _ in range(2)]
    assert {tuple(answer.shape) for answer in answers} == {(2, 4)}
    assert not torch.equal(*answers), "dropout drops"
    means = [name for name in before if name.endswith("running_mean")]
    assert all(not torch.equal(before[name], smaller.state_dict()[name]) for name in means)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, images):
        return self.fc(nn.functional.dropout(images.mean((2, 3)), training=self.training))


def test_a_network_that_runs_alike_in_training_keeps_its_mode() -> None:
    said: list[str] = []
    network = build(Functional, say=said.append).network.train()
    assert not said
    images = torch.from_numpy(IMAGES)
    assert not torch.equal(network(images), network(images)), "what is dropped is chosen anew"
