"""Norms of layers: against torch, their names, when they are recorded, and where TensorBoard shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from eva_rl.tracking import Resume, Tracker
from eva_rl.tracking.layers import layer_norms, short_name
from eva_rl.tracking.tensorboard import LAYOUT, layout_of
from eva_rl.tracking.tracker import read_metrics


def test_norms_are_those_of_torch_for_matrices_that_are_trained() -> None:
    torch.manual_seed(0)
    network = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2, bias=False), "c": nn.Linear(2, 2)})
    network["b"].to(torch.bfloat16)
    network["c"].requires_grad_(False)
    network["a"](torch.randn(5, 3)).square().sum().backward()
    found = layer_norms(network)
    weight, gradient = network["a"].weight.detach(), network["a"].weight.grad
    assert found == {
        "layers/weight_norm/a": pytest.approx(float(torch.linalg.matrix_norm(weight))),
        "layers/weight_norm/b": pytest.approx(float(torch.linalg.matrix_norm(network["b"].weight.detach().float()))),
        "layers/gradient_norm/a": pytest.approx(float(torch.linalg.matrix_norm(gradient))),
    }
    assert layer_norms(network["c"]) == {}


NAMES = {
    "base_model.model.blocks.0.q.lora_A.default.weight": "blocks.0.q.A",
    "blocks.0.q.lora_B.default.weight": "blocks.0.q.B",
    "blocks.0.q.lora_E.default": "blocks.0.q.E",
    "blocks.0.q.miss_block.default.weight": "blocks.0.q.block",
    "head.modules_to_save.default.weight": "head",
    "net.0.weight": "net.0",
    "weight_head.default_value.weight": "weight_head.default_value",
}


@pytest.mark.parametrize(("name", "short"), NAMES.items())
def test_each_layer_is_in_one_chart_of_each_kind(name: str, short: str) -> None:
    """AdaLoRA's E and layers of a Sequential, whose names end in one letter or digit, were in none."""
    assert short_name(name) == short
    for kind in ("weight", "gradient"):
        tag = f"layers/{kind}_norm/{short}"
        charts = [title for title, (_, (regex,)) in LAYOUT["Layers"].items() if re.match(regex, tag)]
        assert len(charts) == 1
        assert charts[0].lower().startswith(kind)
        assert layout_of([tag]) == {"Layers": {charts[0]: LAYOUT["Layers"][charts[0]]}}


def steps_with_norms(tmp_path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(tmp_path) if any(key.startswith("layers/") for key in row)]


@pytest.mark.parametrize("killed", [False, True])
def test_norms_are_recorded_whatever_is_logged_between(killed: bool, tmp_path: Path) -> None:
    """A validation before the training metrics of its step took their norms away, and so did an earlier phase."""
    network = nn.Linear(2, 2)
    tracker = Tracker(tmp_path, trackers=())
    tracker.watch(network, 500)  # every ten steps
    tracker.log({"bc/train/loss": 1.0}, 300)
    for step in range(5, 51, 5):
        tracker.log({"validation/success_rate": 0.5}, step)
        tracker.log({"train/loss": 0.5}, step)
        if killed and step == 25:
            tracker.close()
            tracker = Tracker(tmp_path, Resume(25), trackers=())
            tracker.watch(network, 500)
    tracker.close()
    assert steps_with_norms(tmp_path) == [5, 10, 20, 30, 40, 50]
