"""How numbers get into a page of the documentation: between two comments of it, and nothing else is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; its cells are Markdown, too."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        SystemExit: The page lacks the marks.
    """
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    written, found = pattern.subn(lambda _: f"{begin}\n\n{text}\n\n{end}", page.read_text(), count=1)
    if not found:
        raise SystemExit(f"{page} has no place for the numbers: expected {begin} and, below it, {end}.")
    page.write_text(written)
