"""Whether the network that a search begins with answers better than chance, and what is likely wrong where not."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from evaluators.data import LabelledImages
from evaluators.streams import Stream
from search.config.units import percent
from search.pipeline.given_network import GivenNetwork
from spaces.errors import UserError

NEAR_CHANCE = 2.0
"""A network whose accuracy is below this multiple of chance is hardly better than guessing."""
_SHARE = 0.1
"""Neither is one that has less than this share of what lies between chance and a perfect network."""
_ENOUGH = 500
"""Images that tell chance from a network that was trained."""
_RENUMBERED = 0.5
"""Accuracy under the best renumbering of the classes, from which their order is what is wrong."""
_CONSTANT = 0.8
"""Share of the images that get the same answer, from which the network hardly looks at them."""


class ChanceError(UserError):
    """The network that a search would begin with is hardly better than guessing."""


def is_near_chance(accuracy: float, classes: int) -> bool:
    """Returns whether an accuracy is hardly better than guessing among so many classes."""
    chance = 1 / classes
    return accuracy < min(NEAR_CHANCE * chance, chance + _SHARE * (1 - chance))


def check_better_than_chance(given: GivenNetwork) -> None:
    """Checks the network's accuracy, before anything else is trained or timed.

    Raises:
        ChanceError: it is hardly better than guessing; the likely cause and what mends it are named.
    """
    images, classes = _some(given.scored), given.data.classes
    answers = given.deployed(given.runtime.capabilities().precisions[0]).answers_to(images)
    accuracy = float(answers.correct.mean())
    if is_near_chance(accuracy, classes):
        raise ChanceError(
            f"a search begins with a network that was trained, got an accuracy of {percent(accuracy)} on {len(images)}"
            f" validation images, hardly better than guessing among {classes} classes; {_cause(given, answers.classes)}"
        )


def _some(images: LabelledImages) -> LabelledImages:
    """Returns the first images, which are shuffled where there are many; all of a stream."""
    few = isinstance(images, Stream) or len(images) <= _ENOUGH
    return images if few else images.some(np.arange(_ENOUGH))


def _cause(given: GivenNetwork, predicted: NDArray[np.int64]) -> str:
    """Returns the likely cause, and the option that mends it."""
    labels = given.scored.labels[: len(predicted)]
    if given.study.training is not None:
        return "train it for longer, or with another learning_rate, under [training]"
    renumbered = renumbered_accuracy(predicted, labels, given.data.classes)
    is_named = given.loaded.preprocessing is not None
    if renumbered >= _RENUMBERED:
        order = "give their names in its own order with --labels" if is_named else "let the data number them as it does"
        return f"its classes have other numbers, under which {percent(renumbered)} are right: {order}"
    if not given.built.has_weights:
        return "no weights were given: give --weights, or a section [training] in a study file"
    most = float(np.bincount(predicted).max() / len(predicted))
    same = f"{most:.0%} of the images get the same answer; " if most >= _CONSTANT else ""
    if is_named:
        return (
            f"{same}its input, {given.loaded.preprocessing}, is likely not what it was trained with: give --size,"
            " --mean and --std, or with --labels the order of its classes"
        )
    return f"{same}the images that {given.study.data.source} returns are likely not what it was trained with"


def renumbered_accuracy(predicted: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> float:
    """Returns the accuracy of predictions if each class had the number that suits them best, each number once."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (predicted, labels), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(labels))
