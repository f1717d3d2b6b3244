"""A report as one self-contained HTML page."""

from collections.abc import Callable, Sequence
from html import escape

from plotly.offline import get_plotlyjs

from search.report.overview import Overview
from search.report.plotly_figures import figures
from search.report.report import Report, Section, Table, front_of, report_of
from search.results.pareto import Version

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 1100px;
  padding: 16px 20px; }
h1 { font-size: 1.5em; margin: .3em 0; } h2 { font-size: 1.2em; margin: 1.6em 0 .4em; }
h3 { font-size: 1em; margin: 1.2em 0 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8em 0; font-size: 14px; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child { text-align: left; }
tr.dense { color: #666; } a { color: #0072b2; } li { overflow-wrap: anywhere; }
"""
_CONFIG = {"responsive": True, "displaylogo": False}
Link = Callable[[Version], str | None]


def page(overview: Overview, link: Link | None = None) -> str:
    """Returns the report of a search with its pictures and plotly's script.

    Args:
        overview: of the search.
        link: returns the address of a version's page, or None.
    """
    report = report_of(overview)
    drawn = {
        heading: figure.to_html(include_plotlyjs=False, full_html=False, config=_CONFIG)
        for heading, figure in figures(overview).items()
    }
    body = "\n".join(_section(section, drawn, overview, link) for section in report.sections)
    return _document(report, body)


def _document(report: Report, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>\n"
        f"<body><h1>{escape(report.title)}</h1>\n{body}\n</body></html>\n"
    )


def _section(section: Section, drawn: dict[str, str], overview: Overview, link: Link | None) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    if section.is_list:
        parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in section.lines)}</ul>")
    else:
        parts += [f"<p>{escape(line)}</p>" for line in section.lines]
    parts += [_front(overview, link) if section.heading == "Front" else _table(table) for table in section.tables]
    for heading in section.pictures:
        if heading in drawn:
            title = "" if heading == section.heading else f"<h3>{escape(heading)}</h3>"
            parts.append(f"{title}\n{drawn[heading]}")
    return "\n".join(parts) if len(parts) > 1 else ""


def _table(table: Table) -> str:
    return _markup(table.headings, [[escape(cell) for cell in row] for row in table.rows])


def _front(overview: Overview, link: Link | None) -> str:
    table = front_of(overview)
    rows = [[escape(cell) for cell in row] for row in table.rows]
    for row, version in zip(rows, overview.front, strict=False):
        address = link(version) if link else None
        if address:
            row[0] = f'<a href="{escape(address)}" target="_blank" rel="noopener">{row[0]}</a>'
    return _markup(table.headings, rows)


def _markup(headings: Sequence[str], rows: list[list[str]]) -> str:
    """Returns a table as HTML, from cells that are HTML."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = []
    for row in rows:
        kind = ' class="dense"' if row[0] == "dense" else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
