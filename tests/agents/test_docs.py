"""The code blocks of docs/policies.md run, in their order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eva_rl.agents import shipped_policies

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.mark.skipif("mt40" not in shipped_policies(), reason="the shipped policy is not there")
def test_the_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
