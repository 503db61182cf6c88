"""Escape untrusted text for Markdown and YAML front matter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

LONGEST_CELL = 300


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no link, no emphasis, no HTML, no end of a table cell."""
    escaped = re.sub(r"([\\`*<>|~$#]|(?<![^\W_])_|_(?![^\W_])|!(?=\[)|\](?=[\[(:])|&(?=\w+;|#))", r"\\\1", text)
    return re.sub(r"(?i)\b(https?|ftp|mailto|www)(?=[:.])", "\\g<1>\N{ZERO WIDTH NON-JOINER}", escaped)


def markdown_cell(value: object) -> str:
    """A value on one line, shortened, for a cell of a table or a heading."""
    return markdown_text(_one_line(value))


def markdown_code(value: object) -> str:
    """A value as code within a line or a cell of a table, whatever backticks it holds."""
    text = _one_line(value).replace("|", r"\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * (longest > 0)
    return f"{fence}{space}{text}{space}{fence}"


def markdown_block(text: str) -> str:
    """Lines as a block of code, which nothing within them ends."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def front_matter(values: Mapping[str, Any]) -> str:
    """YAML between lines of dashes, as the hub reads it."""
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=10**6)}---"


def _one_line(value: object) -> str:
    spaced = " ".join(str(value).split())
    plain = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in spaced)
    return plain if len(plain) <= LONGEST_CELL else f"{plain[:LONGEST_CELL]}..."
