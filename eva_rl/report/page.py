"""A report as Markdown, as one page of HTML that needs nothing else, and on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from eva_rl.adapters.markdown import markdown_text
from eva_rl.report.figures import inline_svg
from eva_rl.report.tables import Table
from eva_rl.report.warnings import ReportWarning

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The page forbids its reader's browser to load anything."""
CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #ffffff; --line: #d9dee3; --card: #f6f8fa;
  --severe: #b42318; --severe-card: #fef1ef; --mild: #9a6700; --mild-card: #fff8e5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9aa5b1; --paper: #14181d; --line: #333b44;
  --card: #1c2229; --severe: #ff9186; --severe-card: #331b1a; --mild: #e8b94a; --mild-card: #2d2614; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; margin: 0 0 .25rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p, .note { max-width: 46rem; } .lead, .note { color: var(--soft); } .note { font-size: .875rem; margin: .4rem 0 0; }
.warning { margin: .6rem 0; padding: .6rem .9rem; border-left: 4px solid var(--mild); background: var(--mild-card);
  border-radius: 0 6px 6px 0; }
.warning.severe { border-color: var(--severe); background: var(--severe-card); font-weight: 600; }
.scroll, figure { overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) 0 0 / .9rem 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) 100% 0 / .9rem 100% no-repeat scroll; }
table.words td, table.words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { padding: .35rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:hover { background: var(--card); }
figure { margin: 1.25rem 0; }
figure svg { width: 100%; min-width: 22rem; max-width: 46rem; height: auto; display: block; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--soft); font-size: .875rem; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--soft); }
code { background: var(--card); padding: .1rem .3rem; border-radius: 4px; font-size: .875em; }
"""


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its files and the line below it."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        text: Paragraphs.
        warnings: What a reader has to know.
        tables: Shown in order, before the figures.
        pictures: Figures.
        folded: Tables that a page folds away.
    """

    title: str
    text: Sequence[str] = ()
    warnings: Sequence[ReportWarning] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[Table] = field(default=())


def markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The report as Markdown; figures are links to ``figures/``."""
    parts = [f"# {markdown_text(title)}", markdown_text(lead)]
    for section in sections:
        parts += [f"## {markdown_text(section.title)}", *map(markdown_text, section.text)]
        parts += [f"> **{'Warning' if w.severe else 'Note'}**: {markdown_text(w.text)}" for w in section.warnings]
        for table in [*section.tables, *section.folded]:
            heading = [f"### {markdown_text(table.title)}"] if table.title else []
            parts += [*heading, markdown_table(table), markdown_text(table.note)]
        parts += [f"![{markdown_text(picture.caption)}](figures/{picture.name}.svg)" for picture in section.pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """The columns and rows of a table, without its title and note."""
    lines = [table.columns, [":---"] + ["---:"] * (len(table.columns) - 1), *table.rows]
    return "\n".join(
        "| " + " | ".join(cell if line is lines[1] else markdown_text(cell) for cell in line) + " |" for line in lines
    )


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The report as one HTML document, with everything inside."""
    body = "\n".join(part for section in sections for part in _html_section(section))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _html_section(section: Section) -> Iterator[str]:
    yield f"<section>\n<h2>{escape(section.title)}</h2>"
    yield from (f"<p>{escape(text)}</p>" for text in section.text)
    for warning in section.warnings:
        yield f'<div class="warning{" severe" if warning.severe else ""}">{escape(warning.text)}</div>'
    yield from map(_html_table, section.tables)
    for picture in section.pictures:
        svg = inline_svg(picture.figure, picture.name, escape(picture.caption))
        yield f"<figure>\n{svg}\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    for table in section.folded:
        yield f"<details>\n<summary>{escape(table.title)}</summary>\n{_html_table(table, titled=False)}\n</details>"
    yield "</section>"


def _html_table(table: Table, titled: bool = True) -> str:
    heading = f"<h3>{escape(table.title)}</h3>\n" if titled and table.title else ""
    columns = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    kind = "words" if table.words else "numbers"
    return f'{heading}<div class="scroll"><table class="{kind}">\n{body}\n</table></div>{note}'


LEAST_COLUMN = 10
"""Columns of the terminal that a number with its interval takes, on lines of their own."""
NAME = 10
"""Columns of the terminal that a folded name has at least."""


def terminal_table(table: Table, width: int) -> RichTable:
    """A table for a terminal so wide.

    In a narrow one intervals get lines of their own, then many columns become rows, then names are folded.
    """
    columns, rows = list(table.columns), [list(row) for row in table.rows]
    if _widths(columns, rows)[1] > width:
        rows = [[cell.replace(" [", "\n[") for cell in row] for row in rows]
    if len(rows) + 1 < len(columns) and LEAST_COLUMN * len(columns) > width:
        columns, *rows = map(list, zip(columns, *rows, strict=True))
    first, whole = _widths(columns, rows)
    shown = RichTable(title=Text(table.title))
    for index, column in enumerate(columns):
        keep = index > 0 and whole - first + NAME <= width
        shown.add_column(Text(column), justify="right" if index else "left", overflow="fold", no_wrap=keep)
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Columns of the terminal that the first column needs, and all of them with their lines."""
    cells = zip(columns, *rows, strict=True)
    needed = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in cells]
    return needed[0], sum(needed) + 3 * len(needed) + 1
