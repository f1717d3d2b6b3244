"""What a dimension is worth: the hypervolume of searches with it and without it, from the same start, as Markdown.

python -m studies.benchmarks.dimensions scenes --records FOLDER [--without depth,size] [--seeds 3] [--trials 100]
python -m studies.benchmarks.dimensions cifar10 --weights resnet20.pt --data imagefolder:PATH --records FOLDER

A study is searched as it is, then without each of the dimensions. Weights that versions share are trained for each of
these spaces on its own, as a user would get them, equally long. Hypervolume is the share of the budget's box, whose
limits come from one measurement of the dense network. Every evaluation is kept in FOLDER: the same command goes on
where it was stopped.
"""

import argparse
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna

from search.commands.libraries import set_up_libraries
from search.config.budget import Budget
from search.config.overrides import Request
from search.config.study import Study
from studies.benchmarks.markdown import print_table
from studies.benchmarks.sampler_problems import Record, StudyCase
from studies.benchmarks.samplers import ARMS, POINTS, search

_WHOLE = "as it is"


def main() -> None:
    """Runs all searches and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--without", default="depth,size", help="dimensions, of which one is left out at a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--sizes", help="of images, where the study has none: auto, or pixels with commas")
    parser.add_argument("--budget", help="another than the study's, as for the search")
    parser.add_argument("--weights", help="of the study's network, as for the search")
    parser.add_argument("--data", help="of the study, as for the search")
    given = parser.parse_args()
    set_up_libraries()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    budget = Budget.parse(given.budget.split(",")) if given.budget else None
    study = Request(study=given.study, budget=budget, weights=given.weights, data=given.data).to_study()
    if given.sizes:
        study = _with_space(study, sizes=_sizes(given.sizes))
    variants = {_WHOLE: study, **{f"without {name}": _without(study, name) for name in given.without.split(",")}}
    given.records.mkdir(parents=True, exist_ok=True)
    baseline = None
    found: dict[str, list[Mapping[int, float]]] = {}
    for name, variant in variants.items():
        record = Record(given.records / f"{Path(given.study).stem} {name}.json.gz")
        record.baseline = record.baseline or baseline
        case = StudyCase(variant, record)
        baseline = record.baseline
        found[name] = []
        for seed in range(given.seeds):
            trace = search(case, ARMS["ehvi"], seed, given.trials)
            record.write()
            found[name].append(trace.hypervolumes)
            shares = ", ".join(f"{value:.4f} at {count}" for count, value in trace.hypervolumes.items())
            print(f"{name}, seed {seed}: {shares}", flush=True)
    _print(found, [count for count in POINTS if count <= given.trials])


def _sizes(text: str) -> str | tuple[int, ...]:
    return text if text == "auto" else tuple(int(size) for size in text.split(","))


def _with_space(study: Study, **values: object) -> Study:
    space = type(study.space).model_validate({**study.space.model_dump(), **values})
    return study.model_copy(update={"space": space})


def _without(study: Study, dimension: str) -> Study:
    return _with_space(study, only=tuple(name for name in study.space.only if name != dimension))


def _print(found: Mapping[str, Sequence[Mapping[int, float]]], counts: Sequence[int]) -> None:
    """Prints each space's hypervolume, and by how much the whole one leads at the end, with its standard error."""
    rows = []
    for name, seeds in found.items():
        cells = [f"{statistics.mean(values):.4f}" for values in ([seed[count] for seed in seeds] for count in counts)]
        gains = [whole[counts[-1]] - own[counts[-1]] for whole, own in zip(found[_WHOLE], seeds, strict=True)]
        each = ", ".join(f"{seed[counts[-1]]:.4f}" for seed in seeds)
        rows.append([name, *cells, each, "-" if name == _WHOLE else _with_error(gains)])
    print()
    print_table(["space", *(f"after {count}" for count in counts), "by seed", "lost without it"], rows)


def _with_error(gains: Sequence[float]) -> str:
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{statistics.mean(gains):.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
