"""Networks by name: weights that fit, or are refused in one line; networks that cannot be searched."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from search.config.progress import Say
from search.config.references import SourceError
from search.config.study import ModelSection, Study
from search.loading.models import NEW_LAYER, build_model, find_weights, usual_preprocessing
from search.loading.network_checks import check_network, check_weights
from search.loading.user_code import UserCodeError, load, source_of
from search.loading.weight_files import read_weights
from search.loading.weights import fit, last_layer
from search.training.dense import trained_network
from tests.helpers import tiny

SMALL = "squeezenet1_1"
"""The quickest of torchvision's to build."""


COLOUR, GREY = (2, 3, 64, 64), (2, 1, 8, 8)


def build(
    source: str,
    classes: int = 4,
    weights: Path | None = None,
    say: Say = lambda _: None,
    download=False,
    shape: tuple[int, ...] = COLOUR,
):
    section = ModelSection(source=source, weights=str(weights) if weights else None)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return build_model(section, find_weights(section, download, say), classes, 0, lambda: images, say)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch hub's, and no way to the network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def pretrained(hub: Path, name: str) -> dict[str, torch.Tensor]:
    """Puts weights where torch hub would have those of a torchvision model, and returns them."""
    from torchvision.models import get_model, get_model_weights

    torch.manual_seed(1)
    state = get_model(name, weights=None).state_dict()
    torch.save(state, hub / get_model_weights(name).DEFAULT.url.rpartition("/")[2])
    return state


def test_weights_are_taken_from_hubs_cache_for_as_many_classes(hub) -> None:
    state, said = pretrained(hub, SMALL), []
    built = build(f"torchvision:{SMALL}", classes=1000, say=said.append)
    assert all(torch.equal(value, state[key]) for key, value in built.network.state_dict().items())
    assert said == ["Weights: SqueezeNet1_1_Weights.IMAGENET1K_V1."]
    assert built.training(None) is None


def test_another_number_of_classes_makes_the_last_layer_anew_and_trains_it(hub) -> None:
    state = pretrained(hub, SMALL)
    built = build(f"torchvision:{SMALL}@IMAGENET1K_V1", classes=5)
    assert (built.fitted.renewed, built.fitted.had) == ("classifier.1", 1000)
    own = built.network.state_dict()
    assert own["classifier.1.weight"].shape[0] == 5
    assert all(torch.equal(own[key], state[key]) for key in own if not key.startswith("classifier.1"))
    assert built.training(None) == NEW_LAYER


def test_without_the_file_a_line_says_what_to_type_and_a_download_that_fails_says_why(hub) -> None:
    with pytest.raises(SourceError, match=r"add --download .* --weights FILE"):
        build(f"torchvision:{SMALL}")
    with pytest.raises(SourceError, match="check the connection"):
        build(f"torchvision:{SMALL}", download=True)
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("torchvision:mobilnet_v2", "did you mean 'mobilenet_v2'"),
        ("torchvision:squeezenet1_1@IMAGENET1K_V7", "one of DEFAULT, IMAGENET1K_V1, none"),
        ("tests.helpers.tiny:nothing", "it has network, no_network, short, sparsity_space, splits"),
        ("tests.nowhere:network", "start from the folder that has it"),
        ("/no/such/file.py:build", "check its path"),
        ("tests.helpers.tiny:no_network", r"broken on purpose at .*tiny.py:\d+"),
        ("tests.helpers.tiny:splits", r"torch\.nn\.Module, got Splits"),
    ],
)
def test_a_network_that_cannot_be_had_is_one_line(source, words, hub) -> None:
    with pytest.raises((SourceError, UserCodeError), match=words) as raised:
        build(source)
    assert "\n" not in str(raised.value)


def test_a_file_of_the_users_own_is_a_factory_and_may_import_its_neighbour(tmp_path) -> None:
    (tmp_path / "neighbour_of_net.py").write_text("from torch import nn\nlayer = nn.Linear\n")
    (tmp_path / "net.py").write_text(
        "from neighbour_of_net import layer\ndef make(num_classes):\n    return layer(3, num_classes)\n"
    )
    built, same, other = (build(f"{tmp_path}/net.py:make", classes=count, shape=(2, 3)) for count in (7, 7, 8))
    assert built.network.out_features == 7
    assert same.key == built.key
    assert other.key != built.key


def test_what_a_factory_loads_itself_is_a_part_of_its_key(tmp_path) -> None:
    (tmp_path / "net.py").write_text(
        "import pathlib, torch\nfrom torch import nn\nFILE = pathlib.Path(__file__).with_name('weights.pt')\n"
        "def build():\n    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))\n"
        "    net.load_state_dict(torch.load(FILE, weights_only=True))\n    return net\n"
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    keys = []
    for value in (1.0, 1.0, 2.0):
        nn.init.constant_(network[1].weight, value)
        nn.init.constant_(network[1].bias, 0.0)
        torch.save(network.state_dict(), tmp_path / "weights.pt")
        keys.append(build(f"{tmp_path / 'net.py'}:build", shape=(2, 8)).key)
    assert keys[0] == keys[1] != keys[2]


def test_code_beside_a_factory_is_a_part_of_what_it_is(tmp_path) -> None:
    texts = []
    for number, (beside, elsewhere) in enumerate((("1", "1"), ("2", "1"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"layers_of_{number}.py").write_text(f"import json\ndef width():\n    return {beside}\n")
        (folder / "net.py").write_text(
            f"from layers_of_{number} import width\nimport json\ndef build():\n    return width() + {elsewhere}\n"
        )
        texts.append(source_of(load(f"{folder / 'net.py'}:build")))
    assert "return 1\n" in texts[0]
    assert "return 2\n" in texts[1]
    assert "JSONDecoder" not in texts[0], "libraries take no part"


def test_input_is_as_the_weights_were_trained() -> None:
    found = usual_preprocessing(ModelSection(source="torchvision:mobilenet_v2@IMAGENET1K_V2"), is_folder=False)
    assert (found.size, found.resize, found.interpolation) == (224, 232, "BILINEAR")
    assert found.mean == (0.485, 0.456, 0.406)
    own = ModelSection(source="torchvision:inception_v3", weights="mine.pt")
    assert usual_preprocessing(own, is_folder=True).size == 299
    assert usual_preprocessing(own, is_folder=False) is None
    assert usual_preprocessing(ModelSection(source="tests.helpers.tiny:network"), is_folder=True) is None


def test_prefixes_and_nests_are_understood(tmp_path) -> None:
    network = tiny.randomized()
    state = network.state_dict()
    prefixed = {f"module._orig_mod.{key}": value for key, value in state.items()}
    for index, content in enumerate((state, {"state_dict": prefixed, "epoch": 3}, {"model": {"state_dict": prefixed}})):
        torch.save(content, tmp_path / f"{index}.pt")
        fresh = tiny.TinyNetwork()
        fit(fresh, read_weights(tmp_path / f"{index}.pt"), 4, "them")
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


def wrapped(state: dict, prefix: str, **others) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()} | others


@pytest.mark.parametrize(
    ("prefix", "others", "left"),
    [
        ("model.", {}, ""),
        ("module.", {"n_averaged": torch.tensor(3)}, "; n_averaged is left out"),
        ("ema_model.module.", {}, ""),
        ("net.backbone.", {"loss.weight": torch.ones(4), "net.ema": torch.ones(1)}, "; loss.weight, net.ema are left"),
    ],
)
def test_a_prefix_that_the_network_lacks_is_taken_off_and_said(prefix, others, left) -> None:
    state, said = tiny.randomized().state_dict(), []
    fresh = tiny.TinyNetwork()
    fit(fresh, wrapped(state, prefix, **others), 4, "net.pt", said.append)
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    assert said[0].startswith(f"Weights: the keys in net.pt begin with {prefix!r}, which is taken off{left}")


def test_weights_that_differ_behind_a_prefix_are_listed_without_it() -> None:
    state = wrapped(tiny.randomized().state_dict(), "model.")
    del state["model.hidden.weight"]
    with pytest.raises(SourceError, match=r"with 1 missing: hidden\.weight; build"):
        fit(tiny.TinyNetwork(), state, 4, "net.pt")


def test_of_a_model_and_its_average_the_one_that_is_taken_is_said(tmp_path) -> None:
    state, said = tiny.randomized().state_dict(), []
    average = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"ema": average, "model": state, "epoch": 3}, tmp_path / "net.pt")
    assert torch.equal(read_weights(tmp_path / "net.pt", said.append)["hidden.weight"], state["hidden.weight"])
    assert said == ["Weights: net.pt has 'model' and 'ema'; 'model' is taken."]


def test_versions_of_layers_survive_a_prefix(tmp_path) -> None:
    # MNASNet refuses weights that do not say their version.
    from torchvision.models import mnasnet0_5

    torch.save(nn.DataParallel(mnasnet0_5(weights=None, num_classes=4)).state_dict(), tmp_path / "net.pt")
    build("torchvision:mnasnet0_5", weights=tmp_path / "net.pt")


def test_old_densenet_keys_and_training_heads_are_understood() -> None:
    from torchvision.models import densenet121, googlenet

    dense = densenet121(num_classes=4)
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for key, value in dense.state_dict().items()
    }
    fit(densenet121(num_classes=4), old, 4, "them")
    full = googlenet(num_classes=4, aux_logits=True, init_weights=False)
    fit(googlenet(num_classes=4, aux_logits=False, init_weights=False), full.state_dict(), 4, "them")


def test_differing_keys_are_listed_and_shortened() -> None:
    state = tiny.randomized().state_dict()
    del state["hidden.weight"]
    state["inner.0.weight"] = torch.zeros(3, 3)
    state |= {f"extra{index}": torch.zeros(1) for index in range(6)}
    with pytest.raises(SourceError) as raised:
        fit(tiny.TinyNetwork(), state, 4, "net.pt")
    message = str(raised.value)
    assert "1 missing: hidden.weight" in message
    assert "6 unexpected: extra0, extra1, extra2, extra3 and 2 more" in message
    assert "inner.0.weight (3, 3) for (24, 16, 3, 3)" in message


def test_files_that_hold_no_weights_are_refused(tmp_path) -> None:
    with pytest.raises(SourceError, match="existing file"):
        read_weights(tmp_path / "none.pt")
    torch.save(tiny.randomized(), tmp_path / "pickled.pt")
    with pytest.raises(SourceError, match=r"torch.save\(network.state_dict"):
        read_weights(tmp_path / "pickled.pt")  # a whole network is code, which is not run
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(SourceError, match="with epoch"):
        read_weights(tmp_path / "epoch.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(SourceError, match=r"state dict that torch\.save or safetensors wrote"):
        read_weights(tmp_path / "text.pt")


def test_safetensors_are_weights(tmp_path) -> None:
    state = tiny.randomized().state_dict()
    save_file(state, tmp_path / "net.safetensors")
    read = read_weights(tmp_path / "net.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in read.items())


def saved(content: object, file: Path, share: float = 1.0) -> Path:
    torch.save(content, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: round(share * len(whole))])
    return file


@pytest.mark.parametrize(
    ("name", "begin", "words"),
    [
        ("net.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git-lfs .* git lfs pull"),
        (
            "net.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "git-lfs .* git lfs pull",
        ),
        ("net.pt", b"\n<!DOCTYPE html>\n<html>", "an HTML page; download the file itself"),
        ("net.pt", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("net.pt", b"", "an empty file"),
        ("net.safetensors", b"\x10\0\0\0\0\0\0\0{", "damaged or not whole"),
        ("net.pt", b"any text", "of another kind; save it with torch.save"),
    ],
)
def test_a_file_of_another_kind_is_said_to_be_what_it_is(name, begin, words, tmp_path) -> None:
    (tmp_path / name).write_bytes(begin)
    with pytest.raises(SourceError, match=words) as raised:
        read_weights(tmp_path / name)
    assert "\x1b" not in str(raised.value)


def test_what_a_weight_file_holds_beside_tensors_is_named(tmp_path) -> None:
    state = tiny.randomized().state_dict()
    with pytest.raises(SourceError, match=r"an object of argparse\.Namespace, which only its code can load"):
        read_weights(saved({"model": state, "args": argparse.Namespace(rate=1)}, tmp_path / "args.pt"))
    with pytest.raises(SourceError, match=r"an object of spaces\.testing\.TinyNetwork"):
        read_weights(saved(tiny.randomized(), tmp_path / "whole.pt"))
    with pytest.raises(SourceError, match="damaged or not whole; copy or download it again"):
        read_weights(saved(state, tmp_path / "half.pt", 0.5))
    torch.jit.trace(tiny.randomized().eval(), torch.zeros(1, 1, 8, 8)).save(tmp_path / "script.pt")
    with pytest.raises(SourceError, match=r"a TorchScript archive; load it with torch\.jit\.load"):
        read_weights(tmp_path / "script.pt")


def test_the_last_layer_is_the_one_that_gives_the_classes() -> None:
    assert last_layer(tiny.TinyNetwork(), 4) == "classifier"
    assert last_layer(tiny.TinyNetwork(), 5) == ""


class Peeking(nn.Module):
    def forward(self, images):
        logits = images.flatten(1)[:, :4]
        return logits * 2 if images.mean() > 0 else logits - 1


class Rolling(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :4] + torch.rand(1)


class Failing(nn.Module):
    def forward(self, images):
        return images.no_such_method()


class Twofold(nn.Module):
    def forward(self, images):
        return images, images


class Sized(nn.Module):
    """Fixes the size of the batch when it is traced."""

    def __init__(self, size) -> None:
        super().__init__()
        self.size, self.last = size, nn.Linear(64, 4)

    def forward(self, images):
        assert images.shape[1] == 1
        return self.last(images.reshape(self.size(images), -1))


class Stubborn(nn.BatchNorm2d):
    """Never leaves training mode."""

    def train(self, mode: bool = True):
        return super().train(True)


def with_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def with_value(key: str, value: float) -> nn.Module:
    network = tiny.randomized()
    network.state_dict()[key].view(-1)[3] = value
    return network


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Sized(len), r"any number of images, .* at .*test_loading_models.py:\d+; write x.flatten\(1\)"),
        (Sized(lambda x: int(x.shape[0])), r"any number of images, .* at .*test_loading_models.py:\d+"),
        (
            with_norm(nn.BatchNorm2d(4, track_running_stats=False)),
            r"'1' \(BatchNorm2d\) normalises by the batch, .* no running statistics",
        ),
        (with_norm(Stubborn(4)), r"'1' \(Stubborn\) .* stays in training mode"),
        (
            with_value("inner.1.running_mean", -torch.inf),
            r"finite numbers, got .*, first from 'inner.1' \(BatchNorm2d\)",
        ),
        (nn.Conv2d(3, 4, 8), r"reads images of 3 channels: .* three values each under \[data\]"),
        (Peeking(), r"decides by what it sees at .*test_loading_models.py:\d+"),
        (Rolling(), "same image alike"),
        (Failing(), r"no_such_method.* at .*test_loading_models.py:\d+"),
        (Twofold(), "got tuple"),
        (nn.Flatten(), r"4 logits an image.*\(no images of 'dogwood': .*\(2, 64\) for 2 images"),
    ],
)
def test_a_network_that_cannot_be_searched_says_where(network, words) -> None:
    images = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    with pytest.raises(UserCodeError, match=words):
        check_network(network, images, 4, ["dogwood"])


@pytest.mark.parametrize("key", ["hidden.weight", "inner.1.running_mean"])
def test_a_weight_that_is_no_number_is_named(key) -> None:
    check_weights(with_value(key, 1.0))
    with pytest.raises(UserCodeError, match=f"weights are numbers, got 1 NaN in '{key}'; give"):
        check_weights(with_value(key, torch.nan))


def test_colours_that_a_grey_network_does_not_read_are_told_with_the_remedy() -> None:
    images = np.zeros((2, 3, 8, 8), np.float32)
    with pytest.raises(UserCodeError, match=r"1 channel: mean and std of one value each .* make image files grey"):
        check_network(tiny.randomized(), images, 4, [])


def test_a_network_that_can_be_searched_passes() -> None:
    from torchvision.models import shufflenet_v2_x0_5

    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    check_network(shufflenet_v2_x0_5(num_classes=4), images, 4, [])


def test_without_training_the_network_is_taken_as_it_is(cache, tmp_path) -> None:
    torch.save(tiny.randomized().state_dict(), tmp_path / "net.pt")
    text = tiny.STUDY.replace("training = {epochs = 4, batch = 50, learning_rate = 0.05}\n", "")
    study = Study.parse(text, "test")
    assert study.training is None
    built = build("tests.helpers.tiny:network", weights=tmp_path / "net.pt", shape=GREY)
    network = trained_network(study, built, tiny.splits(), lambda *_: None)
    for key, value in tiny.randomized().state_dict().items():
        assert torch.equal(network.trunk.state_dict()[key], value)
