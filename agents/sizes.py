"""Shapes of Decision Transformers by name."""

from __future__ import annotations

from collections.abc import Mapping

SIZES: Mapping[str, Mapping[str, int]] = {
    "small": {"hidden_size": 128, "num_layers": 4, "num_heads": 4, "context_length": 20},
    "base": {"hidden_size": 512, "num_layers": 4, "num_heads": 8, "context_length": 50},
    "large": {"hidden_size": 768, "num_layers": 6, "num_heads": 12, "context_length": 50},
}
"""Keyword arguments of :class:`eva_rl.agents.DecisionTransformerConfig`.

About 1, 13 and 43 million parameters. ``base`` is the policy of EVA's experiments (arXiv 2410.07170, section 4.5) and
``large`` the 40M one of L2M (arXiv 2306.14884), both without their task sets' token vocabularies.
"""
