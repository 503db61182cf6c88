"""Hostile names in Markdown, HTML and on the terminal: read back by parsers of others."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from eva_rl.report.figures import aggregate_figure, style
from eva_rl.report.page import Picture, Section, markdown, markdown_table, page, terminal_table
from eva_rl.report.reading import one_line
from eva_rl.report.tables import Table
from eva_rl.report.warnings import ReportWarning
from tests.report.making_groups import analysis_of

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></section></svg>", "a|b",
    "[x](javascript:1)", "![x](y)", "`code` **bold** _em_ ~~s~~", "# heading", "&lt; &amp; &#65;", "$x^2$ $$",
    r"\alpha \\", "--><b>", "]]>", "[bold red]x[/]", "_hidden", "a_b __c__", "__init__.py", "a__b _c_d_", "{x} %s",
    "<!-- c -->", "1. one", "- dash", "snake_case_name",
]  # fmt: skip


class Seen(HTMLParser):
    """Tags, attributes and text of a page, as a browser takes them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def sections(name: str) -> list[Section]:
    """A name at every place of a report."""
    table = Table(name, ["method", name], [[name, "0.5"]], name)
    return [Section(name, [name], [ReportWarning(name), ReportWarning(name, severe=True)], [table], folded=[table])]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_page_has_the_same_elements_whatever_the_names(name: str) -> None:
    plain, found = (Seen(page(one, one, sections(one))) for one in ("plain", name))
    assert found.tags == plain.tags
    assert found.attributes == plain.attributes
    assert found.cells.count(name) == plain.cells.count("plain") == 15


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_the_same_blocks_whatever_the_names(name: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

    def kinds(one: str) -> list[str]:
        return [token.type for token in parser.parse(markdown(one, f"Lead: {one}", sections(f"x {one}")))]

    assert kinds(name) == kinds("plain")
    inline = [t for t in parser.parse(markdown_table(Table("", [name], [[name]]))) if t.type == "inline"]
    shown = ["".join(child.content for child in t.children or ()) for t in inline]
    assert [text.replace("\N{ZERO WIDTH NON-JOINER}", "") for text in shown] == [name, name]
    assert {child.type for t in inline for child in t.children or ()} <= {"text", "text_special"}


@settings(max_examples=60)
@given(st.lists(st.text(min_size=1).map(one_line).filter(bool), min_size=2, max_size=2))
def test_cells_of_markdown_keep_their_columns(cells: list[str]) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    tokens = [t.type for t in parser.parse(markdown_table(Table("", ["a", "b"], [cells])))]
    assert (tokens.count("th_open"), tokens.count("td_open"), tokens.count("table_open")) == (2, 2, 1)


@pytest.mark.filterwarnings("error")
def test_figures_of_hostile_names_are_sound() -> None:
    """Dollar signs are no formulas, labels are no XML, and two figures of a page share no id."""
    scores = {name: {"t": [0.5, 0.6]} for name in ("$x^2$ $$", r"_\frac{", "--><b>]]>&lt;")}
    with style():
        analysis = analysis_of(scores)
        pictures = [Picture(name, "a <b> & c", aggregate_figure(analysis)) for name in ("one", "two")]
        found = page("t", "l", [Section("s", pictures=pictures)])
    figures = re.findall(r"<svg.*?</svg>", found, flags=re.S)
    assert len(figures) == 2
    for figure in figures:
        ElementTree.fromstring(figure)
    names = [value for key, value in Seen(found).attributes if key == "id"]
    assert len(names) == len(set(names)) > 10
    assert set(Seen(found).tags).isdisjoint({"script", "img", "b"})
    assert found.count('aria-label="a &lt;b&gt; &amp; c"') == 2
    assert "#0a0b0c" not in found, "in the page's own text colour"


def test_many_columns_become_rows() -> None:
    """Of 26 methods at 80 columns all but one were shown empty."""
    methods = [f"eva_{number}" for number in range(12)]
    table = Table("", ["task", *methods], [("push", *("0.8 [0.7, 0.9]" for _ in methods))])
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(terminal_table(table, 80))
    assert [line.split()[1] for line in captured.get().splitlines() if "eva_" in line] == methods


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_narrow_terminal_shows_every_character(width: int) -> None:
    """Names had ended in an ellipsis, so that two of them could look alike."""
    interval = "0.827 [0.777, 0.868]"
    table = Table("", ["method", "rank", "IQM", "mean"], [("eva_whiten_gain_at_rank_8", "8", interval, interval)])
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        console.print(terminal_table(table, width))
    shown = captured.get()
    assert max(map(len, shown.splitlines())) <= width
    cells = zip(*(line.split("│")[1:-1] for line in shown.splitlines() if line.startswith("│")), strict=True)
    found = ["".join(column).replace(" ", "") for column in cells]
    assert found == [cell.replace(" ", "") for cell in table.rows[0]]
    if width >= 80:
        assert "[0.777, 0.868]" in shown
