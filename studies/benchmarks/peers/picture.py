"""All contestants' fronts in one picture."""

from collections.abc import Sequence
from pathlib import Path

from studies.benchmarks.peers.measure import Result, by_seed


def draw(results: Sequence[Result], ours: str, title: str, file: Path) -> None:
    """Draws accuracy over latency: a staircase for each contestant and seed, ours in front of the others."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(result.contestant for result in results):
        color = None
        for own in by_seed(result for result in results if result.contestant == name).values():
            front = _front(own)
            line = axes.step(
                [result.latency for result in front],
                [result.accuracy * 100 for result in front],
                where="post",
                marker="D" if name == ours else "o",
                linewidth=2.4 if name == ours else 1.1,
                zorder=3 if name == ours else 2,
                color=color,
                label=None if color else name,
            )[0]
            color = line.get_color()
            axes.errorbar(
                [result.latency for result in own],
                [result.accuracy * 100 for result in own],
                yerr=[result.error * 100 for result in own],
                fmt=".",
                color=color,
                alpha=0.35,
            )
    axes.set(xlabel="latency, as a share of the dense network's", ylabel="accuracy on unseen images, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _front(results: Sequence[Result]) -> list[Result]:
    """Returns the versions that none is beaten by in both, from the fastest on."""
    front: list[Result] = []
    for result in sorted(results, key=lambda each: each.latency):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front
