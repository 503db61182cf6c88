"""How numbers get into a page of the documentation: between two comments of it, and nothing else is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; its cells are Markdown, too."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def json_records(place: Path) -> list[Any]:
    """The records of a file, or of a folder with one a file."""
    if place.is_dir():
        return [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    return list(json.loads(place.read_text()))


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
