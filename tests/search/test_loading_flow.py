"""From a command line with a network and a folder of one's own to a picked version; and what `init` writes."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from search.cli import run
from search.config.budget import Budget
from search.config.overrides import Request
from search.config.study import FinalSection, Study, StudyError, load_study
from search.loading import image_store as images_module
from search.pipeline.chance import is_near_chance
from search.pipeline.pipeline import build_pipeline
from tests.helpers.pictures import CLASSES, troubled_folder, write_folder

NETWORK = """
from torch import nn


def build(num_classes):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, num_classes))
"""
STUDY = """
name = "trees"
question = "Which?"
budget = ["latency<1000%"]
model.source = "net.py:build"
data.source = "imagefolder:trees"
training = {epochs = 6, batch = 16, learning_rate = 0.05}
exits.after = []
search.trials = 3
"""


@pytest.fixture
def home(tmp_path, monkeypatch, cache) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def test_a_folder_with_trouble_gets_from_a_study_to_a_picked_version(home, capsys, monkeypatch) -> None:
    troubled_folder(home / "trees")
    assert run(["--study", "study.toml"]) == 0
    text = capsys.readouterr().out
    for words in (
        "Skipped 1 of 200",
        "ash/000.png",
        "No images of 'dogwood'",
        "laid on white",
        "5 classes",
        "Input: 8x8",
    ):
        assert words in text
    (folder,) = home.glob("runs/trees-*")
    record = json.loads((folder / "splits.json").read_text())
    assert record["corrupt"] == ["ash/000.png"]
    # Paths hold from everywhere, so a version is picked, and the search goes on, from another folder.
    monkeypatch.chdir("/")
    assert run(["pick", "--runs", str(home / "runs"), "--out", str(home / "deploy")]) == 0
    assert "test images" in capsys.readouterr().out
    assert run(["--study", str(folder / "study.toml"), "--runs", str(home / "runs")]) == 0
    assert re.search(r"Going on with search trees-\w+-ehvi-0: \d trials are there", capsys.readouterr().out)
    done = subprocess.run([sys.executable, home / "deploy" / "run.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


COMMAND = ["--model", "net.py:build", "--weights", "net.pt", "--data", "imagefolder:trees", "--budget", "latency<1000%"]


def write_network(order: tuple[int, ...] = (0, 1, 2, 3), slope: float = 1.0) -> None:
    """Writes weights that tell the four kinds of pictures by the place of the bright bar, its classes in this order."""
    torch.manual_seed(0)
    namespace: dict = {}
    exec(NETWORK, namespace)
    state = namespace["build"](4).state_dict()
    for name in ("0.weight", "5.weight", "5.bias"):
        state[name].zero_()
    state["0.weight"][0, :, 1, 1] = 1.0
    state["0.bias"].fill_(9.0)
    for place, number in enumerate(order):
        state["5.weight"][number, 4 * place : 4 * place + 4] = slope  # the place's row in the first channel
    torch.save({"state_dict": state}, "net.pt")


def test_a_search_without_a_study_file_needs_a_model_data_and_a_budget(home, capsys) -> None:
    write_folder(home / "trees", each=30)
    write_network()
    assert run([*COMMAND, "--trials", "2", "--batch", "2", "--threads", "2"]) == 0
    assert "hardly better than guessing" not in capsys.readouterr().out
    (folder,) = home.glob("runs/net-trees-*")
    written = Study.parse((folder / "study.toml").read_text(), "written")
    assert written.training is None
    assert written.model.weights == str(home / "net.pt")
    assert (written.target.batch, written.target.threads) == (2, 2)
    assert "net for trees keeps latency<1000% on onnxruntime, 2 at a time" in written.question


def test_a_network_at_chance_ends_the_search_before_anything_is_trained(home, capsys) -> None:
    write_folder(home / "trees", each=30)
    write_network(slope=0.0)  # always the same class
    assert run(COMMAND) == 2
    written = capsys.readouterr()
    assert "got an accuracy of 25.00% on" in written.err
    assert "hardly better than guessing among 4 classes; 100% of the images get the same answer" in written.err
    assert "give --size, --mean and --std" in written.err
    assert written.err.count("\n") == 1
    assert "Measuring" not in written.out
    assert not list(home.glob("runs/*/journal.log"))
    flat = "\n\ndef flat(num_classes):\n    network = build(num_classes)\n    nn.init.zeros_(network[-1].weight)\n"
    (home / "own.py").write_text(f"{NETWORK}{flat}    return network\n")
    assert run(["--model", "own.py:flat", *COMMAND[4:]]) == 2
    assert "no weights were given: give --weights, or a section [training]" in capsys.readouterr().err


def test_classes_in_another_order_are_noticed_and_named_by_a_file(home, capsys) -> None:
    write_folder(home / "trees", each=30)
    write_network(order=(3, 2, 1, 0))
    assert run(COMMAND) == 2
    error = capsys.readouterr().err
    assert "its classes have other numbers, under which 100.00% are right: give their names in its own order" in error
    names = home / "classes.txt"
    for text, words in (("elm\nbirch\n", "none of 'ash', 'cedar'"), ("elm\n" * 2 + "\n".join(CLASSES), "'elm' twice")):
        names.write_text(text)
        assert run([*COMMAND, "--labels", "classes.txt"]) == 2
        assert words in capsys.readouterr().err
    names.write_text("\n".join(reversed(CLASSES)))
    assert run([*COMMAND, "--labels", "classes.txt", "--trials", "1"]) == 0
    assert "accuracy 100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("accuracy", "classes", "is_near"),
    [
        (0.189, 10, True),
        (0.191, 10, False),
        (0.54, 2, True),
        (0.6, 2, False),
        (0.0019, 1000, True),
        (0.0021, 1000, False),
    ],
)
def test_what_is_near_chance_depends_on_the_number_of_classes(accuracy, classes, is_near) -> None:
    assert is_near_chance(accuracy, classes) == is_near


def test_the_command_line_says_what_the_input_is(home) -> None:
    data = Request(study="study.toml", size=12, mean="0.5, 0.4,0.3", std="1,1,2", labels="names.txt").to_study().data
    assert (data.size, data.mean, data.std) == (12, (0.5, 0.4, 0.3), (1, 1, 2))
    assert data.labels == str(home / "names.txt")
    assert data.source == f"imagefolder:{home}/trees"
    (home / "own.toml").write_text(STUDY.replace("imagefolder:trees", "data.py:splits"))
    for request, words in (
        (Request(study="own.toml", size=12), "got --size for"),
        (Request(study="study.toml", mean="grey"), "--mean is a number for each channel"),
        (Request(study="study.toml", std="0"), "[data] std"),
    ):
        with pytest.raises(StudyError, match=re.escape(words)):
            request.to_study()


def test_a_file_of_labels_alone_changes_the_question(home) -> None:
    plain, named = (Request(study="study.toml", labels=labels).to_study() for labels in (None, "names.txt"))
    assert plain.question_key == load_study("study.toml").question_key != named.question_key
    assert '"labels"' not in json.dumps(plain.model_dump(mode="json", exclude_none=True))


def test_the_command_line_replaces_what_a_study_says(home, monkeypatch) -> None:
    study = Request(study="study.toml", data="cifar10:there", batch=4).to_study()
    assert study.data.source == f"cifar10:{home}/there"
    assert study.name == "net-there"
    assert study.model == load_study("study.toml").model
    assert study.target.batch == 4
    weighted = Request(study="study.toml", weights="net.pt").to_study()
    assert weighted.training is None
    assert weighted.model.weights == f"{home}/net.pt"
    other = Request(study="study.toml", model="torchvision:resnet18").to_study()
    assert other.exits.after is None
    assert other.name == "resnet18-trees"
    assert Request(study="study.toml").to_study() == load_study("study.toml")
    tight = Budget.parse(["latency<1ms"])
    assert Request(study="study.toml", budget=tight).to_study().budget == tight


def test_a_value_that_cannot_be_is_told_with_its_section(home) -> None:
    with pytest.raises(StudyError, match=r"^\[target\] batch is at least 1, got 0; leave it out for 1$"):
        Request(study="study.toml", batch=0).to_study()


def test_a_network_of_its_own_needs_a_budget_only_to_be_searched(home) -> None:
    request = Request(model="torchvision:resnet18", data="cifar10:there")
    assert request.to_study().budget == Budget(())
    with pytest.raises(StudyError, match="add --budget"):
        request.check_budget()
    Request(study="study.toml").check_budget()


def test_a_study_that_begins_with_a_byte_order_mark_is_read(home) -> None:
    plain = load_study("study.toml")
    (home / "study.toml").write_text(STUDY, encoding="utf-8-sig")
    assert load_study("study.toml") == plain


def test_a_study_survives_being_written(home) -> None:
    for study in (load_study("digits"), load_study("study.toml")):
        assert Study.parse(study.to_toml(), "written") == study


def test_images_that_are_read_again_each_time_give_the_same_search(home, monkeypatch) -> None:
    write_folder(home / "trees", each=20)
    kept = build_pipeline(load_study("study.toml"), lambda *_: None)
    monkeypatch.setattr(images_module, "KEPT_BYTES", 0)
    lazy = build_pipeline(load_study("study.toml"), lambda *_: None)
    assert lazy.data.validation.images._kept is None
    assert lazy.fingerprint == kept.fingerprint
    assert lazy.builder.ranges == kept.builder.ranges
    dense = kept.space.dense()
    answers = [pipeline.deployed(dense).answers.classes for pipeline in (kept, lazy)]
    np.testing.assert_array_equal(*answers)


def test_fewer_images_than_a_batch_are_one(home) -> None:
    write_folder(home / "trees", each=4)
    text = STUDY.replace("batch = 16", "batch = 64").replace("after = []", 'after = ["2"]')
    pipeline = build_pipeline(Study.parse(text, "small", home), lambda *_: None)
    assert len(pipeline.data.train) < 64
    assert pipeline.network.exit_names == ("exit1",)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    raise ValueError('no such file: w.bin')", ["ValueError: no such file: w.bin", "net.py:4"]),
        ("    return nn.Sequential(nn.Flatten(), nn.Linear(192, 9))", ["4 logits an image", "(2, 9)"]),
        ("    return nn.Sequential(nn.Flatten(), nn.Linear(99, 4))", ["maps images 2 3 8 8", "cannot be multiplied"]),
        ("    return 7", ["torch.nn.Module, got int"]),
        ("    raise ValueError('\\x1b[31mred\\x1b[0m')", ["ValueError: red at"]),
        ("    return nn.(", ["SyntaxError", "net.py:4"]),
    ],
)
def test_what_is_wrong_with_a_users_network_is_one_line(home, capsys, body, words) -> None:
    write_folder(home / "trees", each=20)
    (home / "net.py").write_text(f"from torch import nn\n\ndef build(num_classes):\n{body}\n")
    assert run(["--study", "study.toml"]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert error.count("\n") == 1
    assert not list(home.rglob("journal.log"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STUDY.replace('"net.py:build"', '"net.py:build"\nmodel.weights = "other.pt"'), "weights have the network's"),
        (STUDY.replace('"net.py:build"', '"net.py:biuld"'), "it has build"),
        (f'{STUDY}data.augment = "net.py:turned"\n', "no function 'turned'"),
        (f'{STUDY}frames.source = "net.py:stream"\n', "no function 'stream'"),
    ],
)
def test_what_needs_no_image_is_refused_before_images_are_read(home, capsys, text, words) -> None:
    write_folder(home / "trees", each=20)
    torch.save({"weight": torch.ones(1)}, home / "other.pt")
    (home / "study.toml").write_text(text)
    assert run(["--study", "study.toml"]) == 2
    written = capsys.readouterr()
    assert words in written.err
    assert "images: 0/" not in written.out
    assert "Images:" not in written.out


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_trained(home, capsys, monkeypatch) -> None:
    write_folder(home / "trees", each=20)
    (home / "file").write_text("no folder")
    monkeypatch.setenv("DEPLOYFRONT_CACHE", str(home / "file" / "cache"))
    assert run(["--study", "study.toml"]) == 2
    written = capsys.readouterr()
    assert "DEPLOYFRONT_CACHE" in written.err
    assert "Training" not in written.out


def test_init_writes_a_study_that_loads_and_says_every_key(home, capsys) -> None:
    assert run(["init", "mine"]) == 0
    assert "--study mine/study.toml" in capsys.readouterr().out
    study = load_study("mine/study.toml")
    assert study.name == "mine"
    assert study.model.source == f"{home}/mine/model.py:build"
    text = (home / "mine" / "study.toml").read_text()
    for name, section in Study.model_fields.items():
        assert name in text
        for kind in (section.annotation, *getattr(section.annotation, "__args__", ())):
            for key in getattr(kind, "model_fields", ()):
                told = f"\n{key} = ", f"\n# {key} = ", f"[{name}.{key}]"
                assert any(words in text for words in told), key
    # What stands behind a # is what holds without it.
    told = [line for line in text.splitlines() if " = " in line or line.startswith(("[", "# ["))]
    shown = "\n".join(line.removeprefix("# ") for line in told)
    defaults = tomllib.loads(shown)
    assert defaults["data"]["train"] == study.data.train
    assert defaults["exits"]["images"] == study.exits.images
    assert defaults["recovery"] == study.recovery.model_dump(exclude_none=True, exclude={"final"})
    assert study.recovery.final.model_dump(exclude_none=True) == FinalSection(of_search=0.5).model_dump(
        exclude_none=True
    )
    assert defaults["space"].pop("channel_step") == 8, "an example: without it, what is measured holds"
    assert defaults["space"] == study.space.model_dump(mode="json", exclude_none=True)


def test_what_init_writes_fits_together(home) -> None:
    from search.loading.prepare import prepare

    run(["init", "mine"])
    loaded, built = prepare(load_study("mine/study.toml"), False, lambda *_: None, lambda _: None)
    assert loaded.splits.classes == 10
    assert loaded.splits.image_shape == (1, 32, 32)
    assert built.training(None) is None


def test_init_leaves_what_is_there_alone(home, capsys) -> None:
    assert run(["init", str(home)]) == 2
    assert "new or an empty folder" in capsys.readouterr().err
    assert (home / "study.toml").read_text() == STUDY
    assert run(["init", str(home / "net.py")]) == 2
    assert "writable folder" in capsys.readouterr().err
