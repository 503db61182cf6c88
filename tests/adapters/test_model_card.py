"""Model cards: what other people's names and texts hold is shown as it is, and is nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from eva_rl.adapters.markdown import markdown_block, markdown_cell, markdown_code
from eva_rl.adapters.model_card import model_card, pretrained_card
from eva_rl.export import card_of
from tests.conftest import make_policy

FACTS: dict[str, Any] = {
    "env": "metaworld/push-v3", "method": "eva_dora", "algo": "bc", "seed": 3, "policy": "mt40", "updates": 400,
    "trainable_parameters": 1_000, "total_parameters": 2_000, "protocol": "50 episodes", "target_return": 12.5,
    "eval_before/success_rate": 0.25, "eval/success_rate": 0.75, "env_steps": 10_000,
    "data": {"source": "expert:push-v3", "episodes": 25, "steps": 5_000, "mean_return": 1_500.0},
}  # fmt: skip
HOSTILE = [
    "a|b | c", "x\n# heading\n---\ntags: [evil]", "```\nrm\n```", "`code` ``x``", "<script>alert(1)</script>",
    "a]: [x](http://y)", "]\nlicense: other", ": {a: 1", "*bold* _x_ ~y~",
    "\x00\x1b[31m", "![i](http://tracker/p.png)", "&lt;b&gt;", "- [ ",
    "%TAG", "y" * 5000,
]  # fmt: skip


def rows(card: str) -> list[list[str]]:
    """Cells of the lines of tables, split where Markdown splits them."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def test_a_card_as_it_should_be() -> None:
    card = model_card(FACTS)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {
        "library_name": "eva-rl",
        "pipeline_tag": "reinforcement-learning",
        "tags": ["reinforcement-learning", "decision-transformer", "eva-dora"],
    }
    for words in (
        "| base | `mt40` |",
        "25 episodes, 5,000 env steps (expert:push-v3), mean return 1500.0",
        "`adapter=eva_dora algo=bc`, 400 gradient steps, 10,000 env steps, seed 3",
        "1,000 of 2,000 parameters",
        "50 episodes; target return 12.5",
        "| success_rate | 0.25 | 0.75 |",
        "python -m eva_rl.evaluate policy=THIS_FOLDER env=metaworld/push-v3",
    ):
        assert words in card, words


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("key", ["env", "method", "algo", "policy", "protocol", "seed", "data"])
def test_a_hostile_text_is_one_cell(key: str, text: str) -> None:
    changed: Any = {**FACTS["data"], "source": text} if key == "data" else text
    sound, card = model_card(FACTS), model_card({**FACTS, key: changed})
    assert [len(row) for row in rows(card)] == [len(row) for row in rows(sound)]
    assert [line for line in card.splitlines() if line.startswith("#")] == [card.splitlines()[5]]
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])  # type: ignore[index]
    assert list(header) == ["library_name", "pipeline_tag", "tags"]
    assert len(header["tags"]) == 3
    assert card.count("\n```") == sound.count("\n```") or text.startswith("`")
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(http", re.sub(r"(`+).*?\1", "", card, flags=re.S))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_of_a_pretrained_policy_too(text: str) -> None:
    card = pretrained_card(text, {"source": text, text: 1, "inner": {"a": text}}, "adapter")
    assert [len(row) for row in rows(card)] == [2] * 4
    assert sum(line.startswith("#") for line in card.splitlines()) == 1


@pytest.mark.parametrize("facts", [None, 3, [], {}, {"env": "x"}, {**FACTS, "data": 5, "updates": "many"}])
def test_what_a_foreign_policy_remembers_may_be_anything(facts: Any) -> None:
    policy = make_policy()
    policy.metadata = {"finetuning": facts}
    assert card_of(policy, "theirs", "merged").startswith("---\nlibrary_name: eva-rl\n")


def test_code_and_blocks_are_not_ended_by_their_content() -> None:
    assert markdown_code("a") == "`a`"
    assert markdown_code("`a`|``") == "``` `a`\\|`` ```"
    assert markdown_block("```") == "````\n```\n````"
    assert markdown_cell("a|b\nc") == r"a\|b c"
