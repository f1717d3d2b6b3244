"""A training whose process is killed outright goes on from its last whole epoch, in a new process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
TRAINING = """
import copy, dataclasses, sys, time
from pathlib import Path
import torch
from search.recovery.elastic import train_elastic
from search.recovery.finetune import finetune
from search.training.loop import TrainingBatches
from search.config.study import ElasticSection, FinetuneSection
from search.training.teacher import Teacher
from spaces.pruning.prunable import find_groups
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from tests.helpers import tiny

kind, folder, stops = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "stops"


@dataclasses.dataclass(frozen=True)
class Noted(TrainingBatches):
    def keyed_epoch(self, index):
        with (folder / "epochs").open("a") as epochs:
            epochs.write(f"{index}\\n")
        for number, batch in enumerate(super().keyed_epoch(index)):
            if stops and index == 1 and number == 2:
                (folder / "waits").touch()
                time.sleep(600)
            yield batch


torch.set_num_threads(1)
torch.manual_seed(5)
network = ExitNetwork(tiny.randomized(), ["pool"], [ExitHead(16, 4, 2)]).eval()
data = tiny.splits()
space = tiny.sparsity_space(network, find_groups(network, torch.zeros(1, 1, 8, 8)).free, step=4, minimum=0.25)
batches, file = Noted(data.train, 50, 0), folder / "checkpoint.pt"
if kind == "elastic":
    teacher, settings = Teacher(copy.deepcopy(network.trunk)), ElasticSection(epochs=3, batch=50)
    done = train_elastic(network, teacher, space, batches, settings, file)
else:
    teacher, half = network, {group.name: max(group.channels // 2, 1) for group in space.groups}
    network = space.apply(teacher, half)
    done = finetune(network, Teacher(teacher.trunk), batches, FinetuneSection(epochs=3, batch=50), file)
torch.save({"network": network.state_dict(), "epochs": done.epochs, "steps": done.steps}, folder / "result.pt")
"""


HEADS = """
import sys, time
from pathlib import Path
import torch
from search.training.exit_heads import train_exits
from search.config.study import ExitsSection
from spaces.dynamic.exit_network import ExitHead, ExitNetwork
from tests.helpers import tiny

kind, folder, stops = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "stops"
calls = {"augment": 0, "exit1": 0, "exit2": 0, "pool": 0}


def called(name, stop):
    calls[name] += 1
    if stops and calls[name] == stop:
        (folder / "waits").touch()
        time.sleep(600)


class Head(ExitHead):
    def __init__(self, name, stop):
        super().__init__(16, 4, 2)
        self.name, self.stop = name, stop

    def forward(self, features):
        called(self.name, self.stop if self.training else 0)
        return super().forward(features)


def augment(images, generator):
    called("augment", 5 if kind == "features" else 0)  # three batches of 125 images a view
    return images + 0.1 * torch.randn(images.shape, generator=generator)


torch.set_num_threads(1)
torch.manual_seed(5)
heads = [Head("exit1", 0), Head("exit2", 50 if kind == "heads" else 0)]
network = ExitNetwork(tiny.randomized(), ["join", "pool"], heads).eval()
network.trunk.pool.register_forward_hook(lambda *_: called("pool", 0))
training = {"training": "joint", "joint": {"epochs": 1, "batch": 50}} if kind == "joint" else {}
if kind == "joint":
    heads[1].stop = 151  # of 25 epochs with 1500 images, in steps of 250; then comes joint training
train_exits(network, tiny.splits(), ExitsSection(**training), augment, 0, folder / "exits.partial.pt", lambda *_: None)
torch.save({"network": network.state_dict(), "calls": calls}, folder / "result.pt")
"""


def start(kind: str, folder: Path, stops: bool, script: str = TRAINING) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, kind, str(folder), "stops" if stops else "runs"]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def epochs(folder: Path) -> list[str]:
    return (folder / "epochs").read_text().split()


def kill_where_it_waits(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "waits").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("kind", ["finetune", "elastic"])
def test_no_epoch_is_repeated_and_the_weights_are_the_same(kind: str, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert start(kind, straight, stops=False).wait(timeout=300) == 0

    kill_where_it_waits(start(kind, killed, stops=True), killed)
    assert epochs(killed) == ["0", "1"], "it was killed in its second epoch"
    assert start(kind, killed, stops=False).wait(timeout=300) == 0

    assert epochs(killed) == ["0", "1", "1", "2"], "only the epoch that was cut short is done again"
    found, expected = (torch.load(folder / "result.pt", weights_only=True) for folder in (killed, straight))
    assert found["epochs"] == expected["epochs"] == 3
    assert found["steps"] == expected["steps"]
    assert all(torch.equal(found["network"][name], value) for name, value in expected["network"].items())


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        # Once more for the temperature at the end. Two of four augmentations are kept, of three batches each; then
        # one head, and a fifth of the other's 150 steps; then both heads, and nothing of eight steps together.
        ("features", {"pool": 7, "exit1": 151, "exit2": 151}),
        ("heads", {"pool": 1, "exit1": 1, "exit2": 121}),
        ("joint", {"augment": 8, "exit1": 9, "exit2": 9}),
    ],
)
def test_a_killed_training_of_exits_goes_on(kind: str, again: dict[str, int], tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert start(kind, straight, stops=False, script=HEADS).wait(timeout=300) == 0
    kill_where_it_waits(start(kind, killed, stops=True, script=HEADS), killed)
    assert start(kind, killed, stops=False, script=HEADS).wait(timeout=300) == 0
    found, expected = (torch.load(folder / "result.pt", weights_only=True) for folder in (killed, straight))
    assert all(torch.equal(found["network"][name], value) for name, value in expected["network"].items())
    assert {name: found["calls"][name] for name in again} == again
    assert {file.name for file in killed.iterdir()} == {"waits", "result.pt"}, "nothing is left behind"
