"""Colours and marks of pictures, also for the colour-blind: colours are distinguishable, and marks differ in shape.

Source: Okabe and Ito, Color Universal Design, 2008; cividis: Nunez, Anderton and Renslow, 2018.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from search.report.overview import DENSE, FRONT, OVER, WITHIN

BLACK = "#000000"
GREY = "#767676"
LIGHT = "#d9d9d9"
ORANGE = "#e69f00"
SKY = "#56b4e9"
GREEN = "#009e73"
YELLOW = "#f0e442"
BLUE = "#0072b2"
VERMILION = "#d55e00"
PURPLE = "#cc79a7"
SEQUENTIAL = "cividis"
"""The colour map of shares; plotly and matplotlib know it by this name."""
LIMIT = BLUE


@dataclass(frozen=True)
class Mark:
    """The mark of one group of versions.

    Args:
        color: hexadecimal.
        plotly: name of the shape.
        matplotlib: name of the shape.
        text: character on a terminal.
    """

    color: str
    plotly: str
    matplotlib: str
    text: str


MARKS: Mapping[str, Mark] = {
    OVER: Mark(GREY, "x-thin-open", "x", "x"),
    WITHIN: Mark(SKY, "circle", "o", "o"),
    FRONT: Mark(VERMILION, "diamond", "D", "#"),
    DENSE: Mark(BLACK, "star", "*", "D"),
}
NOTABLE_SHAPES = (("^", "triangle-up"), ("s", "square"), ("v", "triangle-down"))
"""Shapes of the versions most worth deploying, in matplotlib and plotly."""
PRECISIONS: Mapping[str, str] = {
    "fp32": LIGHT,
    "bf16": "#a6a6a6",
    "fp16": SKY,
    "fp8": YELLOW,
    "int8": ORANGE,
    "int4": GREEN,
}
"""Colours of precisions, which are also named in words."""
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
"""Colours of the parts of stacked bars, which are also separated and named."""
