"""Picked versions against `quantize_static` of the same network, end to end, by a clock of its own, as Markdown.

python -m studies.benchmarks.never_worse --data imagefolder:PATH --resnet20 resnet20.pt --networks FOLDER
    [--budgets 60,45,35,25] [--trials 24] [--batch 1] [--minutes 3] [--runs runs]

FOLDER holds what `studies.benchmarks.cifar_networks` trained. Each network is searched and picked from by the program's
own command line, once for each budget on latency, in % of the dense network's; the weights that its versions share are
trained once, for so many processor minutes. The picked bundle is loaded by its own run.py and answers one real image
after the other, in turn with the dense network and with ONNX Runtime's own int8 file. The timer and the other file come
from `studies.benchmarks.outside`, which shares no code with evaluators/. Accuracy is that on images that neither saw.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluators.data import LabelledImages
from evaluators.runtimes.cpu import cpu_name
from search.config.study import ElasticSection, ExitsSection, Study
from search.loading.prepare import prepare
from studies.benchmarks import outside
from studies.benchmarks.cifar_networks import study_on
from studies.benchmarks.markdown import print_table

_IMAGES = 200
"""So many different images are timed, one batch after the other."""
_HEADINGS = (
    "network", "budget", "int8: latency", "accuracy", "picked: latency", "accuracy", "at its own budget", "verdict",
)  # fmt: skip
_MODELS = {
    "resnet20": "studies.cifar10.model:resnet20",
    "resnet56": "studies.benchmarks.cifar_networks:resnet56",
    "mobile": "studies.benchmarks.cifar_networks:mobile",
}


@dataclass(frozen=True)
class Version:
    """What the outsider found of one file or bundle.

    Args:
        latency: its time as a share of the dense network's, with the ends of the 95% interval.
        accuracy: share of right answers.
        error: the accuracy's standard error.
    """

    latency: outside.Timed
    accuracy: float
    error: float

    def beats(self, other: "Version") -> bool:
        """Returns whether this one is faster and more accurate than another, both by more than chance."""
        is_faster = self.latency.high < other.latency.low
        return is_faster and self.accuracy - self.error > other.accuracy


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--resnet20", required=True, type=Path)
    parser.add_argument("--networks", required=True, type=Path)
    parser.add_argument("--only", default=",".join(_MODELS))
    parser.add_argument("--budgets", default="60,45,35,25")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    given = parser.parse_args()
    rows: list[Sequence[str]] = []
    for name in given.only.split(","):
        weights = given.resnet20 if name == "resnet20" else given.networks / f"{name}.pt"
        study = _study(given.data, name, weights.resolve(), given.minutes, given.batch)
        for budget in given.budgets.split(","):
            rows.append(_row(name, study, budget, given.trials, given.runs))
            print(" | ".join(rows[-1]), flush=True)
    print(
        f"\nONNX Runtime on {cpu_name()}, one thread, batch {given.batch}; latency as a share of the dense network's\n"
    )
    print_table(_HEADINGS, rows)


def _study(data: str, name: str, weights: Path, minutes: float, batch: int) -> Study:
    """Returns the CIFAR-10 study of another network, with exits on the frozen trunk and a short shared training."""
    study = study_on(data, _MODELS[name], weights)
    elastic = ElasticSection(at_most_minutes=minutes)
    sections = {
        "name": name,
        "exits": ExitsSection(images=5000),
        "recovery": study.recovery.model_copy(update={"elastic": elastic, "final": None}),
        "target": study.target.model_copy(update={"batch": batch}),
    }
    return study.model_copy(update=sections)


def _row(name: str, study: Study, budget: str, trials: int, runs: Path) -> Sequence[str]:
    folder = runs / f"{name}-{budget}"
    bundle = folder / "deploy"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.toml"
    file.write_text(study.to_toml(), encoding="utf-8")
    limits = ["--budget", f"latency<{budget}%", "--runs", str(folder)]
    _command("--study", str(file), *limits, "--trials", str(trials))
    is_picked = _command("pick", *limits, "--out", str(bundle)) == 0
    other, picked = _measured(study, bundle if is_picked else None)
    cells = [name, f"{budget}%", f"{other.latency.ratio:.3f}", _accuracy(other)]
    if picked is None:
        return [*cells, "-", "-", "-", "no version within the budget"]
    kept = (
        "kept"
        if picked.latency.low <= float(budget) / 100
        else f"over by {picked.latency.ratio * 100 / float(budget) - 1:.0%}"
    )
    verdict = "int8 is faster and more accurate" if other.beats(picked) else "not beaten"
    return [*cells, f"{picked.latency.ratio:.3f}", _accuracy(picked), kept, verdict]


def _accuracy(version: Version) -> str:
    return f"{version.accuracy:.2%} ± {version.error * 100:.2f}"


def _command(*arguments: str) -> int:
    print(f"$ python -m search {' '.join(arguments)}", file=sys.stderr, flush=True)
    return subprocess.run([sys.executable, "-m", "search", *arguments], check=False, stdout=sys.stderr).returncode


def _measured(study: Study, bundle: Path | None) -> tuple[Version, Version | None]:
    """Returns what ONNX Runtime's own int8 file and the bundle do, beside the dense network."""
    loaded, built = prepare(study, False, lambda *_: None, lambda _: None)
    data, batch = loaded.splits, study.target.batch
    dense = outside.exported(built.network.eval(), data.calibration.images[:1])
    int8 = outside.statically_quantized(outside.preprocessed(dense), data.calibration.images[:], "Percentile")
    answers = {"dense": outside.answering(dense), "int8": outside.answering(int8)}
    if bundle is not None:
        answers["picked"] = outside.bundle(bundle)
    calls = {
        name: outside.one_after_the_other(answer, data.test.images[:_IMAGES], batch) for name, answer in answers.items()
    }
    latencies = outside.timed(calls, turns=31)
    found = {name: _version(latencies[name], answer, data.test, batch) for name, answer in answers.items()}
    return found["int8"], found.get("picked")


def _version(latency: outside.Timed, answer: outside.Answer, test: LabelledImages, batch: int) -> Version:
    starts = range(0, len(test), batch)
    found = np.concatenate([answer(test.images[at : at + batch]).argmax(axis=1) for at in starts])
    accuracy = float((found == test.labels).mean())
    return Version(latency, accuracy, float(np.sqrt(accuracy * (1 - accuracy) / len(test))))


if __name__ == "__main__":
    main()
