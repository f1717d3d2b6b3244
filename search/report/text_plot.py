"""The front as a scatter plot of text characters."""

from search.config.units import milliseconds
from search.report.axes import accuracy_view, coordinates, limit_lines
from search.report.overview import DENSE, FRONT, OVER, WITHIN, Overview
from search.report.palette import MARKS

HEIGHT = 10
_MIN_WIDTH = 40
_MAX_WIDTH = 72
_MARGIN = 9
"""Characters to the left of the plot, for the labels of accuracies."""
_LINES = {False: ("│", "└", "─", "┊"), True: ("|", "+", "-", ":")}


def scatter(overview: Overview, width: int, ascii_only: bool) -> str:
    """Returns accuracy over latency as lines of text.

    The dense network is drawn unless it is far to the right; its latency and accuracy are always in the legend.

    Args:
        overview: with a front.
        width: of a line, in characters.
        ascii_only: whether to use ASCII characters only.
    """
    side, corner, floor, limit = _LINES[ascii_only]
    columns = max(min(width - _MARGIN - 3, _MAX_WIDTH), _MIN_WIDTH)
    points = {name: [coordinates(version) for version in versions] for name, versions in overview.groups.items()}
    shown = [point for name in (OVER, WITHIN, FRONT) for point in points[name]] or points[DENSE]
    left, right = min(point[0] for point in shown), max(point[0] for point in shown)
    lines = [line for line in limit_lines(overview.budget, overview.dense) if line.axis == "x"]
    right = max([right, *(line.value for line in lines if line.value < 2 * right)])
    low, high = accuracy_view(overview) or (min(point[1] for point in shown), max(point[1] for point in shown))
    high = min(high, 100.0)
    height = HEIGHT if high > low else 1
    cells = [[" "] * columns for _ in range(height)]

    def put(latency: float, accuracy: float, mark: str) -> None:
        column = round((latency - left) / ((right - left) or 1) * (columns - 1))
        row = round((high - accuracy) / ((high - low) or 1) * (height - 1))
        if 0 <= column < columns and 0 <= row < height:
            cells[row][column] = mark

    for line in lines:
        for row in range(height):
            put(line.value, high - row * (high - low) / max(height - 1, 1), limit)
    for name in (OVER, WITHIN, DENSE, FRONT):
        for point in points[name]:
            put(*point, MARKS[name].text)
    labels = {height - 1: f"{low:.2f}%", 0: f"{high:.2f}%"}
    rows = [f"{labels.get(row, ''):>{_MARGIN}}{side}{''.join(cells[row])}".rstrip() for row in range(height)]
    scale = milliseconds(left / 1e3)
    ends = f"{'':>{_MARGIN}} {scale}{milliseconds(right / 1e3):>{columns - len(scale)}}"
    text = "\n".join(
        [
            *rows,
            f"{'':>{_MARGIN}}{corner}{floor * columns}",
            ends,
            *_legend(overview, lines != [], limit, left <= coordinates(overview.dense)[0] <= right, width),
        ]
    )
    return text.replace("µs", "us") if ascii_only else text


def _legend(overview: Overview, has_limit: bool, limit: str, has_dense: bool, width: int) -> list[str]:
    """Returns the legend of the marks, one or two lines."""
    marks = {MARKS[name].text: name for name in (FRONT, WITHIN, OVER) if overview.groups[name]}
    entries = [f"{mark} {name}" for mark, name in marks.items()]
    if "latency" not in overview.search.objectives:
        entries.append("over latency, which is no objective")
    if has_limit:
        entries.append(f"{limit} limit")
    latency, accuracy = coordinates(overview.dense)
    dense = f"{MARKS[DENSE].text} dense," if has_dense else "dense:"
    marks_line, dense_text = (
        f"{'':>{_MARGIN}} {'  '.join(entries)}",
        f"{dense} {milliseconds(latency / 1e3)}, {accuracy:.2f}%",
    )
    whole = f"{marks_line}  {dense_text}"
    return [whole] if len(whole) <= width else [marks_line, f"{'':>{_MARGIN}} {dense_text}"]
