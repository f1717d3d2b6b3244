"""This program's front beside those of other tools, at equal processor time, by a timer that shares no code with it.

    python -m studies.benchmarks.peers --data imagefolder:PATH --resnet20 resnet20.pt --networks FOLDER
        [--network resnet56] [--minutes 20] [--only NAME,NAME] [--seeds 0] [--batches 1,16] [--nncf PYTHON] --out FOLDER
    python -m studies.benchmarks.peers redraw --out FOLDER

FOLDER of networks holds what `studies.benchmarks.cifar_networks` trained. Every contestant gets the same trained
network, the same images and the same minutes of processor time; one that cannot be had here is left out, with the
reason. Versions are kept in --out, so the same command goes on where it was stopped. At the end all of them are timed
in one session, in turns with the dense network, and answer test images that nobody saw.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from evaluators.runtimes.cpu import cpu_name
from search.commands.libraries import set_up_libraries
from studies.benchmarks.markdown import print_table
from studies.benchmarks.peers.contestants import (
    Contestant,
    EvenBlocks,
    Nncf,
    PlainOptuna,
    SmallNetwork,
    StaticQuantization,
    ThisProgram,
    TorchPruning,
)
from studies.benchmarks.peers.measure import Made, Result, measured, rows
from studies.benchmarks.peers.picture import draw
from studies.benchmarks.peers.question import Clock, Question

OURS = "this program"
_RESULTS = "results.json"


def main() -> None:
    """Runs the contest, or prints and draws one that was run."""
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    set_up_libraries()
    batches = [int(batch) for batch in given.batches.split(",")]
    if given.what != "redraw":
        results = _run(given, batches)
        (given.out / _RESULTS).write_text(json.dumps([result.to_dict() for result in results], indent=1))
    results = [Result(**content) for content in json.loads((given.out / _RESULTS).read_text())]
    for batch in dict.fromkeys(result.batch for result in results):
        own = [result for result in results if result.batch == batch]
        print(f"\nONNX Runtime on {cpu_name()}, one thread, batch {batch}; the best accuracy within a latency\n")
        names = list(dict.fromkeys(result.contestant for result in own))
        print_table(["latency", *names, f"{OURS} against the best other"], rows(own, OURS))
        draw(own, OURS, f"{given.network}, batch {batch}", given.out / f"{given.network}-batch{batch}.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="run", choices=("run", "redraw"))
    parser.add_argument("--data", default="cifar10:data/cifar10")
    parser.add_argument("--resnet20", type=Path, default=Path("resnet20.pt"))
    parser.add_argument("--networks", type=Path, default=Path("networks"))
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", help="contestants, with commas; all by default")
    parser.add_argument("--seeds", default="0", help="of this program and of what is random in the others")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--nncf", help="an interpreter that has nncf and onnx")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _contestants(given: argparse.Namespace, batch: int) -> Mapping[str, Contestant]:
    """Returns all contestants by name; those that do not depend on the batch take part once."""
    once: dict[str, Contestant] = {
        "quantize_static": StaticQuantization(),
        "NNCF": Nncf(given.nncf),
        "torch-pruning + int8": TorchPruning(),
        "plain Optuna + int8": PlainOptuna(),
        "blocks by hand + int8": EvenBlocks(),
        "small network + int8": SmallNetwork(given.resnet20),
    }
    return {**once, OURS: ThisProgram(batch)}


def _run(given: argparse.Namespace, batches: list[int]) -> list[Result]:
    weights = given.resnet20 if given.network == "resnet20" else given.networks / f"{given.network}.pt"
    questions = [
        Question.asked(given.network, given.data, weights.resolve(), given.minutes, int(seed), given.out)
        for seed in given.seeds.split(",")
    ]
    results = []
    for batch in batches:
        made = [version for question in questions for version in _versions(given, question, batch)]
        results += measured(questions[0].dense_file(), made, questions[0].splits.test, batch)
    return results


def _versions(given: argparse.Namespace, question: Question, batch: int) -> Iterator[Made]:
    """Yields the versions of all contestants, made now or before."""
    wanted = given.only.split(",") if given.only else None
    for name, contestant in _contestants(given, batch).items():
        if wanted is not None and name not in wanted:
            continue
        if (reason := contestant.missing(question)) is not None:
            print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)
            continue
        # Only this program asks for the batch; the others' files are the same at every one.
        place = f"{name}-batch{batch}" if name == OURS else name
        yield from _kept(name, contestant, question, given.out / given.network / f"{place}-seed{question.seed}")


def _kept(name: str, contestant: Contestant, question: Question, folder: Path) -> Iterator[Made]:
    done = folder / "entries.json"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        clock, entries = Clock(), []
        for index, entry in enumerate(contestant.entries(replace(question, folder=folder))):
            file = entry.bundle or folder / f"version{index}.onnx"
            if entry.bundle is None:
                file.write_bytes(entry.file)
            entries.append({"label": entry.label, "file": file.name})
            print(f"{name}, seed {question.seed}: {entry.label}, after {clock.minutes:.1f} min", file=sys.stderr)
        done.write_text(json.dumps(entries, indent=1))
    for entry in json.loads(done.read_text()):
        yield Made(name, question.seed, entry["label"], folder / entry["file"])


if __name__ == "__main__":
    main()
