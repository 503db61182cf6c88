"""MkDocs hook: links out of docs/ (to the README, to benchmarks) become plain names, for the site has no such pages."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\s*(?:\.\./)+[^)\s]+\s*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called for each page before it is rendered."""
    return OUTSIDE.sub(r"\1", markdown)
