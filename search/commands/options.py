"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from evaluators.runtimes.registry import check_target


def _known_target(name: str | None) -> str | None:
    """Returns a target that exists, if any is named; an unknown one is told before heavy libraries are imported."""
    if name is not None:
        check_target(name)
    return name


StudyName = Annotated[
    str | None, typer.Option("--study", help="Name of an included study, or path of a study.toml; default: scenes.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="SOURCE", help="torchvision:NAME[@WEIGHTS], module:function, file.py:function."),
]
Weights = Annotated[str | None, typer.Option("--weights", metavar="FILE", help="File with a state dict for the model.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="SOURCE", help="imagefolder:PATH, cifar10:PATH, ..., module:function, file.py:function."
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision download missing weights and images.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the searches and of the MLflow database.")]
Search = Annotated[str | None, typer.Option("--search", metavar="NAME", help="Name of a search; default: the latest.")]
SearchToRun = Annotated[
    str | None, typer.Option("--search", metavar="NAME", help="Name of this search; default: study, sampler and seed.")
]
SearchOfStudy = Annotated[str | None, typer.Option("--search", metavar="NAME", help="Take the study of this search.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="LIMIT",
        help="Hard limit, such as 'latency<5ms' or latency=5ms; repeat the option or separate limits by commas.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        callback=_known_target,
        help="Runtime to measure on, or ssh://[user@]host[:port] for a board; see: doctor.",
    ),
]
OtherTarget = Annotated[
    str | None,
    typer.Option(
        "--against-target",
        metavar="TARGET",
        callback=_known_target,
        help="Compare with the same files on this other target.",
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", metavar="URI", help="MLflow server; default: $MLFLOW_TRACKING_URI, else a database in --runs."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and warnings.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON; everything else goes to standard error.")
]
