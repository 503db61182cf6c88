"""MkDocs hooks: links out of docs/ become plain names, and the API reference finds what lies beside eva_rl/."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mkdocs.plugins import event_priority

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\s*(?:\.\./)+[^)\s]+\s*\)")
ROOT = Path(__file__).parent.parent
BESIDE = ("agents", "envs", "configs")
"""Folders that setuptools maps into the package."""


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Lay the package out as a wheel does, for mkdocstrings reads its files."""
    place = Path(mkdtemp(prefix="eva-rl-docs-"))
    ignored = shutil.ignore_patterns("__pycache__", "pretrained")
    shutil.copytree(ROOT / "eva_rl", place / "eva_rl", ignore=ignored)
    for name in BESIDE:
        shutil.copytree(ROOT / name, place / "eva_rl" / name, ignore=ignored)
    config.plugins["mkdocstrings"].config.handlers.setdefault("python", {})["paths"] = [str(place)]
    config.extra["package"] = str(place)
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called for each page before it is rendered; the API's pages lie one folder deeper, inside of docs/."""
    return markdown if page.file.src_uri.startswith("api/") else OUTSIDE.sub(r"\1", markdown)


def on_post_build(config: Any) -> None:
    """Remove what :func:`on_config` made."""
    shutil.rmtree(config.extra["package"], ignore_errors=True)
