"""How many evaluations each sampler needs: hypervolume after 25, 50, 100 and 200, and the seconds it takes itself.

python -m studies.benchmarks.samplers synthetic [--seeds 5]
python -m studies.benchmarks.samplers tight
python -m studies.benchmarks.samplers scenes --record scenes.json.gz --arms 'ehvi=100,TPE,NSGA-II,TPE + warm start=100'
python -m studies.benchmarks.samplers redraw --record scenes.json.gz
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from search.config.budget import Budget
from search.config.overrides import Request
from search.config.registries import SAMPLERS
from search.config.study import Study
from search.loop.sampler_observations import observe_evaluations
from search.samplers.base import SearchKnowledge
from studies.benchmarks.markdown import print_table
from studies.benchmarks.sampler_problems import Case, Record, StudyCase, SyntheticCase
from studies.benchmarks.synthetic import Setting

POINTS = (25, 50, 100, 200)
_TIGHT = 100
"""Trials at most where the first version within tight limits is looked for."""


@dataclass(frozen=True)
class Arm:
    """One way to propose.

    Args:
        sampler: its name.
        is_warm: whether it begins with the seeds that all warm arms share.
        most: trials at most, where it takes too long itself.
    """

    sampler: str
    is_warm: bool
    most: int = max(POINTS)


ARMS: Mapping[str, Arm] = {
    "random": Arm("random", False),
    "TPE": Arm("tpe", False),
    "TPE + warm start": Arm("tpe", True),
    "NSGA-II": Arm("nsga2", False),
    "NSGA-II + warm start": Arm("nsga2", True),
    "GP + warm start": Arm("gp", True, 50),
    "ehvi": Arm("ehvi", True),
}


@dataclass(frozen=True)
class Trace:
    """What one arm did with one seed.

    Args:
        keys: what it evaluated, in order.
        hypervolumes: after so many evaluations.
        seconds: of CPU a trial that the sampler itself took.
        first: the first trial that kept all limits; None where none did.
    """

    keys: tuple[str, ...]
    hypervolumes: Mapping[int, float]
    seconds: float
    first: int | None


def search(case: Case, arm: Arm, seed: int, trials: int) -> Trace:
    """Returns what an arm does with a case."""
    knowledge = SearchKnowledge(lambda: case.prior, partial(observe_evaluations, objectives=case.objectives))
    made: BaseSampler = SAMPLERS[arm.sampler](seed, knowledge)
    directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * (len(case.objectives) - 1)]
    study = optuna.create_study(directions=directions, sampler=made)
    for values in case.warm if arm.is_warm else ():
        study.enqueue_trial(dict(values), skip_if_exists=True)
    keys: list[str] = []
    own, first = 0.0, None
    for number in range(min(trials, arm.most)):
        begin = time.process_time()
        trial = study.ask(dict(case.space))
        own += time.process_time() - begin
        outcome = case.evaluate(trial.params)
        keys.append(outcome.key)
        for name, violation in outcome.violations.items():
            trial.set_constraint(name, violation)
        if outcome.evaluation:
            trial.set_user_attr("evaluation", dict(outcome.evaluation))
        is_whole = outcome.values[0] is not None
        if first is None and is_whole and all(violation <= 0 for violation in outcome.violations.values()):
            first = number
        begin = time.process_time()
        if is_whole:
            study.tell(trial, [value for value in outcome.values if value is not None])
        else:
            study.tell(trial, state=TrialState.PRUNED)
        own += time.process_time() - begin
    hypervolumes = {count: case.hypervolume(keys[:count]) for count in POINTS if count <= len(keys)}
    return Trace(tuple(keys), hypervolumes, own / len(keys), first)


def _arm(name: str) -> Arm:
    """Returns what an arm's name stands for: one of `ARMS`, or a sampler of that name with the warm start."""
    return ARMS.get(name) or Arm(SAMPLERS.known(name), True)


def compare(
    make: Callable[[int], Case], arms: Mapping[str, int], seeds: int, after: Callable[[str, int, Trace], None]
) -> dict[str, list[Trace]]:
    """Returns what each arm does with each seed in so many trials; `after` is called with each."""
    traces: dict[str, list[Trace]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, trials in arms.items():
            trace = search(make(seed), _arm(name), seed, trials)
            traces[name].append(trace)
            after(name, seed, trace)
    return traces


def print_hypervolumes(traces_of: Mapping[str, Sequence[Trace]]) -> None:
    """Prints means over seeds with the lowest and the highest, and the seconds of the samplers themselves."""
    heads = ["sampler", *(f"{count} evaluations" for count in POINTS), "its own CPU seconds a trial"]
    rows = []
    for name, traces in traces_of.items():
        cells = []
        for count in POINTS:
            values = [trace.hypervolumes[count] for trace in traces if count in trace.hypervolumes]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-")
        rows.append([name, *cells, f"{statistics.mean(trace.seconds for trace in traces):.3f}"])
    print_table(heads, rows)


def print_verdict(traces_of: Mapping[str, Sequence[Trace]]) -> None:
    """Prints whether ours keeps what it promises against each of Optuna's arms."""
    ours = traces_of["ehvi"]
    for rival in ("TPE", "NSGA-II"):
        if rival in traces_of and all(200 in trace.hypervolumes for trace in traces_of[rival]):
            pairs = list(zip(ours, traces_of[rival], strict=False))  # the seeds that both have
            won = sum(mine.hypervolumes[50] >= other.hypervolumes[200] for mine, other in pairs)
            print(f"ehvi at 50 reaches {rival} at 200 in {won} of {len(pairs)} seeds")
    if len(traces_of.get("TPE + warm start", ())) > 1:
        pairs = list(zip(ours, traces_of["TPE + warm start"], strict=False))
        gains = [mine.hypervolumes[100] - other.hypervolumes[100] for mine, other in pairs]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        print(f"ehvi leads TPE + warm start at 100 by {statistics.mean(gains):.4f}, standard error {error:.4f}")


def draw(traces_of: Mapping[str, Sequence[Trace]], title: str, file: Path) -> None:
    """Draws the mean hypervolume of each arm over evaluations, with all seeds behind it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, traces in traces_of.items():
        counts = [count for count in POINTS if all(count in trace.hypervolumes for trace in traces)]
        means = [statistics.mean(trace.hypervolumes[count] for trace in traces) for count in counts]
        (line,) = axes.plot(counts, means, marker="o", label=name, linewidth=2.5 if name == "ehvi" else 1.2)
        for trace in traces:
            axes.plot(counts, [trace.hypervolumes[count] for count in counts], color=line.get_color(), alpha=0.15)
    axes.set(xlabel="evaluations", ylabel="hypervolume", title=title, ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _tight(seeds: int, arms: Mapping[str, int]) -> None:
    """Prints, for budgets that no uniform configuration keeps, when the first version is found that does."""
    rows = []
    for exits, limit_s in ((0, 0.003), (3, 0.003), (3, 0.0026)):
        setting = Setting(exits=exits, limit_s=limit_s)
        traces_of = compare(partial(SyntheticCase, setting=setting), arms, seeds, lambda *_: None)
        for name, traces in traces_of.items():
            firsts = ["never" if trace.first is None else str(trace.first + 1) for trace in traces]
            rows.append([f"{limit_s * 1e3:g} ms, {exits} exits", name, ", ".join(firsts)])
    print_table(["limit", "sampler", "first version within the limits, by seed"], rows)


def _study(study: Study, record: Record, arms: Mapping[str, int], seeds: int) -> dict[str, list[Trace]]:
    case = StudyCase(study, record)

    def keep(arm: str, seed: int, trace: Trace) -> None:
        record.runs.setdefault(arm, {})[str(seed)] = {
            "keys": list(trace.keys),
            "hypervolumes": {str(count): value for count, value in trace.hypervolumes.items()},
            "seconds": trace.seconds,
            "first": trace.first,
        }
        record.write()
        _say(arm, seed, trace)

    return compare(lambda _seed: case, arms, seeds, keep)


def _recorded(record: Record) -> dict[str, list[Trace]]:
    return {
        arm: [
            Trace(
                tuple(run["keys"]),
                {int(count): value for count, value in run["hypervolumes"].items()},
                run["seconds"],
                run["first"],
            )
            for _, run in sorted(runs.items(), key=lambda item: int(item[0]))
        ]
        for arm, runs in record.runs.items()
    }


def _say(arm: str, seed: int, trace: Trace) -> None:
    shares = ", ".join(f"{value:.4f} at {count}" for count, value in trace.hypervolumes.items())
    print(f"{arm}, seed {seed}: {shares}; {trace.seconds:.3f} s a trial", flush=True)


def main() -> None:
    """Runs one comparison and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="synthetic, tight, redraw, or a study's name or file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=max(POINTS))
    parser.add_argument("--arms", default=",".join(ARMS), help="their names, each with =TRIALS where it takes fewer")
    parser.add_argument("--record", type=Path, help="of a study's evaluations")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--objectives", help="other than the study's, as for the search")
    parser.add_argument("--budget", help="another than the study's, as for the search")
    parser.add_argument("--weights", help="of the study's network, as for the search")
    parser.add_argument("--data", help="of the study, as for the search")
    arguments = parser.parse_args()
    named = [name.partition("=") for name in arguments.arms.split(",")]
    arms = {SAMPLERS.renamed(name): int(trials or arguments.trials) for name, _, trials in named}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    if arguments.what == "tight":
        _tight(arguments.seeds, {name: _TIGHT for name in arms if _arm(name).is_warm and _arm(name).most >= _TIGHT})
        return
    if arguments.what == "synthetic":
        traces_of = compare(lambda seed: SyntheticCase(seed, Setting()), arms, arguments.seeds, _say)
    elif arguments.record is None:
        parser.error("a study's evaluations are recorded: add --record FILE.json.gz")
    elif arguments.what == "redraw":
        traces_of = _recorded(Record(arguments.record))
    else:
        budget = Budget.parse(arguments.budget.split(",")) if arguments.budget else None
        request = Request(
            study=arguments.what,
            budget=budget,
            weights=arguments.weights,
            data=arguments.data,
            objectives=tuple(arguments.objectives.split(",")) if arguments.objectives else None,
        )
        study = request.to_study()
        traces_of = _study(study, Record(arguments.record), arms, arguments.seeds)
    print_hypervolumes(traces_of)
    print_verdict(traces_of)
    if arguments.plot:
        draw(traces_of, f"{arguments.what}, {arguments.seeds} seeds", arguments.plot)


if __name__ == "__main__":
    main()
