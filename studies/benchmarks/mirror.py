"""What MLflow's mirror costs: milliseconds a trial and bytes on disk, for as many trials as one likes.

The trials are those of a finished search, over and over, with other figures: python -m studies.benchmarks.mirror
runs/NAME --trials 1000. With --keep the folder stays, for a look at it: python -m search ui --runs FOLDER.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.commands.libraries import set_up_libraries
from search.results.store import SearchFolder, StoredSearch
from search.tracking.store import DATABASE, Tracking

_VARIED = {"accuracy": 0.02, "latency": 0.3, "flops": 0.3}
"""By so much of itself each figure is varied."""


def main() -> None:
    """Writes a long search and its mirror, and prints what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", type=Path, help="the folder of a finished search")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="where the runs stay")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _measure(arguments.search, arguments.keep or Path(folder), arguments.trials)


def lengthened(search: StoredSearch, runs: Path, trials: int) -> StoredSearch:
    """Returns a search with so many trials, made of another's and written to `runs`."""
    folder, chance = SearchFolder(runs / "long"), random.Random(0)
    source = [trial for trial in search.trials if "evaluation" in trial.user_attrs and trial.values]
    with folder.lock():
        stored = folder.create(search.objectives)
        for name, value in search.folder.open().user_attrs.items():
            stored.set_user_attr(name, value)
        stored.add_trials([_varied(source[index % len(source)], index, chance) for index in range(trials)])
        return StoredSearch.read(folder)


def _varied(trial: FrozenTrial, index: int, chance: random.Random) -> FrozenTrial:
    evaluation = dict(trial.user_attrs["evaluation"])
    measured = dict(evaluation["measurements"])
    for name, share in _VARIED.items():
        value = measured[name]["value"] * (1 + share * chance.uniform(-1, 1))
        measured[name] = measured[name] | {"value": min(value, 1.0) if name == "accuracy" else value}
    channels = dict(evaluation["candidate"]["channels"])
    first = next(iter(channels))
    channels[first] = index + 1  # so that each is a candidate of its own
    evaluation |= {"measurements": measured, "candidate": evaluation["candidate"] | {"channels": channels}}
    return create_trial(
        state=TrialState.COMPLETE,
        values=[measured[name]["value"] for name in _VARIED],
        params=trial.params,
        distributions=trial.distributions,
        user_attrs={"evaluation": evaluation},
    )


def _measure(source: Path, runs: Path, trials: int) -> None:
    set_up_libraries()
    from search.tracking.mirror import Mirror  # imports MLflow, which reads its settings

    search = lengthened(StoredSearch.read(SearchFolder(source)), runs, trials)
    mirror = Mirror(Tracking.of(runs), search)
    wall, processor = [], []
    for trial in search.trials:
        begin, began = time.perf_counter(), time.process_time()
        mirror.write_one(trial)
        wall.append((time.perf_counter() - begin) * 1e3)
        processor.append((time.process_time() - began) * 1e3)
    begin = time.perf_counter()
    mirror.finish()
    finish = time.perf_counter() - begin
    files = [file for file in (runs / "artifacts").rglob("*") if file.is_file()]
    print(f"{trials} trials of {len(search.trials[0].params)} choices each")
    for name, values in (("wall clock", wall), ("processor", processor)):
        tail = np.median(values[-100:])
        print(
            f"  {name}: {np.median(values):.1f} ms a trial (median), {np.mean(values):.1f} mean, last 100: {tail:.1f}"
        )
    print(f"  summary: {finish:.1f} s; its files: {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")
    print(f"  database: {(runs / DATABASE).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
