"""Several adapters on one policy: switched, turned off, merged and unmerged in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft.helpers import rescale_adapter_scale

from eva_rl.adapters import attach_adapter, load_policy, save_adapted_policy
from eva_rl.adapters.attach import base_weights
from eva_rl.agents import DecisionTransformerPolicy, save_policy
from eva_rl.agents.policy_folder import weights_digest
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories
from eva_rl.errors import UnknownNameError, UserError
from tests.adapters.making import attached, train
from tests.adapters.test_folders import trained, windows
from tests.conftest import make_policy, unseal


def acted(policy: DecisionTransformerPolicy, batch: WindowBatch) -> torch.Tensor:
    return policy.network(batch).detach()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "olora", "mica"])
def test_off_merged_and_unmerged_in_place(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    expected, batch = trained(method, reach_demonstrations, tmp_path / "policy"), windows(reach_demonstrations)
    base = make_policy().network(batch).detach()
    policy = load_policy(tmp_path / "policy")
    with policy.adapters.off():
        assert close(acted(policy, batch), base)
    assert close(acted(policy, batch), expected)
    policy.adapters.merge()
    assert close(acted(policy, batch), expected)
    name = "blocks.0.mlp.up_proj.base_layer.weight"
    assert not torch.equal(policy.network.get_parameter(name), make_policy().network.blocks[0].mlp.up_proj.weight)
    with pytest.raises(UserError, match="unmerge"):
        policy.adapters.use(None)
    policy.adapters.unmerge()
    assert weights_digest(base_weights(policy.network)) == policy.adapters.base_sha256, "to the last bit"
    assert close(acted(policy, batch), expected)
    with policy.adapters.off():
        assert close(acted(policy, batch), base)


def test_a_merged_adapter_is_neither_saved_nor_trained(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """The base would hold it, and the adapter beside it a second time."""
    expected, batch = trained("lora", reach_demonstrations, tmp_path / "policy"), windows(reach_demonstrations)
    policy = load_policy(tmp_path / "policy")
    adapter = policy.adapters.attached()
    policy.adapters.merge()
    with pytest.raises(UserError, match=r"'default' is merged.*unmerge"):
        policy.adapters.attached()
    with pytest.raises(UserError, match=r"is merged.*unmerge"):
        save_adapted_policy(tmp_path / "again", policy, adapter, "card")
    assert not (tmp_path / "again").exists()
    policy.adapters.unmerge()
    save_adapted_policy(tmp_path / "again", policy, policy.adapters.attached(), "card")
    assert close(acted(load_policy(tmp_path / "again"), batch), expected)


@pytest.mark.parametrize("how", ["merge_and_unload", "unload", "merge=True"])
def test_a_policy_without_its_adapter_can_be_trained(
    how: str, tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    """All its parameters stayed frozen."""
    trained("lora", reach_demonstrations, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy", merge=how == "merge=True")
    if how != "merge=True":
        assert not any(p.requires_grad for p in policy.network.parameters())
        getattr(policy.adapters, how)()
    assert all(p.requires_grad for p in policy.network.parameters())


def test_an_attached_adapter_is_not_taken_for_none(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """What the base does alone would else be measured with the adapter at work."""
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base")
    train(policy, reach_demonstrations, attach_adapter(policy, "lora", rank=2))
    calls = (
        lambda: policy.adapters.off().__enter__(),
        policy.adapters.merge,
        policy.adapters.merge_and_unload,
        policy.adapters.unload,
        policy.adapters.attached,
    )
    for call in calls:
        with pytest.raises(UserError, match=r"from attach_adapter.*save_adapted_policy"):
            call()


def test_one_adapter_a_task(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """Of different methods, ranks and layers, on the base that they have in common."""
    batch = windows(reach_demonstrations)
    expected = {
        name: trained(name, reach_demonstrations, tmp_path / name, rho=2.0) for name in ("eva", "dora", "pissa")
    }
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base", adapters={name: tmp_path / name for name in expected})
    assert policy.adapters.names == ("eva", "dora", "pissa")
    base = make_policy().network(batch)
    assert close(acted(policy, batch), base), "the base acts until one is chosen"
    for name in ("pissa", "eva", "dora", "eva"):
        policy.adapters.use(name)
        assert policy.adapters.active == name
        assert close(acted(policy, batch), expected[name]), name
    with pytest.raises(UnknownNameError, match=r"'evva'.*'eva'"):
        policy.adapters.use("evva")
    policy.adapters.use("pissa")
    policy.adapters.merge_and_unload()
    assert close(acted(policy, batch), expected["pissa"])
    assert policy.adapters.names == ()


@pytest.mark.parametrize("method", ["dora", "adalora", "mica", "miss"])
def test_a_trainable_adapter_stays_so(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """Of those that were loaded to be trained, the parameters of the active one ask for gradients, and no others."""
    trained(method, reach_demonstrations, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy", is_trainable=True)

    def asking() -> set[str]:
        return {name for name, p in policy.network.named_parameters() if p.requires_grad}

    trainable = asking()
    assert trainable
    with policy.adapters.off():
        assert not asking()
    assert asking() == trainable
    policy.adapters.use(None)
    policy.adapters.use("default")
    assert asking() == trainable
    policy.adapters.add("fixed", tmp_path / "policy/adapter")
    assert policy.adapters.active == "fixed"
    assert not asking()
    policy.adapters.use("default")
    assert asking() == trainable


def test_an_adapter_that_asks_for_no_gradients_is_not_trained(
    tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    trained("lora", reach_demonstrations, tmp_path / "lora")
    policy = load_policy(tmp_path / "lora")
    with pytest.raises(UserError, match=r"nothing to train.* is_trainable=True"):
        train(policy, reach_demonstrations, policy.adapters.attached())


def test_a_second_adapter_to_be_trained_is_the_active_one(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    first = trained("lora", reach_demonstrations, tmp_path / "lora")
    second = trained("dora", reach_demonstrations, tmp_path / "dora")
    policy, batch = load_policy(tmp_path / "lora", is_trainable=True), windows(reach_demonstrations)
    policy.adapters.add("more", tmp_path / "dora/adapter", is_trainable=True)
    assert policy.adapters.active == "more"
    assert close(acted(policy, batch), second)
    assert all(".more." in name for name, p in policy.network.named_parameters() if p.requires_grad)
    policy.adapters.use("default")
    assert close(acted(policy, batch), first)
    assert all(".default." in name for name, p in policy.network.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("window", ["cached", "static"])
@pytest.mark.parametrize("method", ["lora", "miss"])
def test_a_switch_acts_at_once(
    window: Literal["cached", "static"], method: str, tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    """Where the decoder keeps its own copy of the weights, and where modules are called; no reset between."""
    trained(method, reach_demonstrations, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy")
    policy.window = window

    def first() -> np.ndarray:
        return policy.act(np.ones((2, 39), np.float32), np.zeros(2, np.float32), np.ones(2, bool))

    def after(change: Callable[[], object]) -> np.ndarray:
        change()
        policy.reset(["metaworld/reach-v3"] * 2)
        return first()

    on, off = after(lambda: None), after(lambda: policy.adapters.use(None))
    assert np.abs(on - off).max() > 1e-4
    policy.adapters.use("default")
    np.testing.assert_allclose(first(), on, atol=1e-6)
    with policy.adapters.off():
        np.testing.assert_allclose(first(), off, atol=1e-6)
    np.testing.assert_allclose(first(), on, atol=1e-6)
    policy.adapters.merge()
    np.testing.assert_allclose(first(), on, atol=1e-5)
    policy.adapters.unmerge()
    if method == "lora":
        with rescale_adapter_scale(policy.network, 0.0):
            np.testing.assert_allclose(first(), off, atol=1e-6)
        np.testing.assert_allclose(first(), on, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "adalora", "mica"])
def test_an_adapter_of_another_name_is_saved(method: str, tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """In the place of any other: a policy folder has one adapter, whatever it was called while it was loaded."""
    expected, batch = trained(method, reach_demonstrations, tmp_path / "first"), windows(reach_demonstrations)
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base", adapters={"push": tmp_path / "first"})
    save_adapted_policy(tmp_path / "second", policy, policy.adapters.attached(), "card")
    first, second = ({p.relative_to(folder) for p in folder.rglob("*")} for folder in tmp_path.glob("[fs]*"))
    assert first == second
    again = load_policy(tmp_path / "second")
    assert again.adapters.active == "default"
    assert close(acted(again, batch), expected)


def test_what_cannot_go_together(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    for name in ("lora", "adalora"):
        trained(name, reach_demonstrations, tmp_path / name)
    save_policy(tmp_path / "base", make_policy())
    save_policy(tmp_path / "other", make_policy(seed=1))
    with pytest.raises(UserError, match="ADALORA and LORA"):
        load_policy(tmp_path / "base", adapters={"a": tmp_path / "lora", "b": tmp_path / "adalora"})
    with pytest.raises(UserError, match="holds no adapter"):
        load_policy(tmp_path / "base", adapters={"a": tmp_path / "base"})
    with pytest.raises(UserError, match="different base weights"):
        load_policy(tmp_path / "other", adapters={"a": tmp_path / "lora"})
    with pytest.raises(UserError, match=r"adapters=\[.*\]: expected names and where each is, \{NAME: PATH\}"):
        load_policy(tmp_path / "base", adapters=[tmp_path / "lora"])  # type: ignore[arg-type]


def test_the_target_return_comes_with_the_adapter(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    policy, adapter = attached("lora", reach_demonstrations)
    policy.set_target_return(1234.0, "metaworld/reach-v3")
    save_adapted_policy(tmp_path / "reach", policy, adapter, "card")
    save_policy(tmp_path / "base", make_policy())
    loaded = load_policy(tmp_path / "base", adapters={"reach": tmp_path / "reach" / "adapter"})
    assert loaded.conditioning.of("metaworld/reach-v3") == 1234.0


def test_an_adapter_of_no_task_brings_no_target_return(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """It brought the policy's own, for the task "", and the task's was lost without a word."""
    policy, adapter = attached("lora", reach_demonstrations)
    policy.env_id = ""
    policy.set_target_return(1234.0, "metaworld/reach-v3")
    save_adapted_policy(tmp_path / "nameless", policy, adapter, "card")
    policy.env_id = "metaworld/reach-v3"
    save_adapted_policy(tmp_path / "named", policy, adapter, "card")
    save_policy(tmp_path / "base", make_policy())
    loaded = load_policy(tmp_path / "base", adapters={"nameless": tmp_path / "nameless"})
    assert loaded.conditioning == make_policy().conditioning
    loaded.adapters.add("named", tmp_path / "named")
    assert loaded.conditioning.of("reach-v3") == 1234


def test_an_adapter_that_is_named_by_its_task_is_saved(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    """PEFT wrote it to a folder in a folder, where nothing was moved to."""
    expected, batch = trained("lora", reach_demonstrations, tmp_path / "policy"), windows(reach_demonstrations)
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base", adapters={"metaworld/push-v3": tmp_path / "policy"})
    policy.adapters.use("metaworld/push-v3")
    save_adapted_policy(tmp_path / "again", policy, policy.adapters.attached(), "card")
    assert close(acted(load_policy(tmp_path / "again"), batch), expected)
    assert not any(path.is_dir() for path in (tmp_path / "again/adapter").iterdir())


def test_each_adapter_of_a_task_has_its_own_target_return(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    for name, target in (("a", 10.0), ("b", 20.0)):
        policy, adapter = attached("lora", reach_demonstrations)
        policy.set_target_return(target, "metaworld/reach-v3")
        save_adapted_policy(tmp_path / name, policy, adapter, "card")
    save_policy(tmp_path / "base", make_policy())
    loaded = load_policy(tmp_path / "base", adapters={name: tmp_path / name / "adapter" for name in "ab"})
    asked = []
    for name in ("a", "b", None, "a"):
        loaded.adapters.use(name)
        asked.append(loaded.conditioning.of("metaworld/reach-v3"))
    assert asked == [10.0, 20.0, 20.0, 10.0]
    loaded.set_target_return(7.0, "metaworld/reach-v3")
    loaded.adapters.use("b")
    assert loaded.conditioning.of("metaworld/reach-v3") == 7.0, "set by the user since"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("return_scale", {"return_scale": 20.0}),
        ("observation_mean", {"observation_mean": torch.full((39,), 0.5)}),
        ("action_high", {"action_half_range": torch.full((4,), 0.5)}),
    ],
)
def test_an_adapter_of_another_scaling_is_refused(
    name: str, changes: dict[str, Any], tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    """The weights of the base are the same; what they would be shown is not."""
    policy = make_policy()
    policy.scaling = replace(policy.scaling, **changes)
    save_adapted_policy(tmp_path / "run", *attached("lora", reach_demonstrations, policy=policy), "card")
    save_policy(tmp_path / "base", make_policy())
    with pytest.raises(UserError, match=f"another .*{name}"):
        load_policy(tmp_path / "base", adapters={"run": tmp_path / "run"})
    assert load_policy(tmp_path / "run", adapters={"again": tmp_path / "run"}).adapters.names == ("default", "again")
    unseal(tmp_path / "run/adapter/eva_rl.json")
    origin = json.loads((tmp_path / "run/adapter/eva_rl.json").read_text())
    (tmp_path / "run/adapter/eva_rl.json").write_text(json.dumps({k: v for k, v in origin.items() if k != "scaling"}))
    earlier = load_policy(tmp_path / "base", adapters={"run": tmp_path / "run/adapter"})
    assert earlier.adapters.names == ("run",), "earlier versions did not say"


def test_an_adapter_that_does_not_fit_leaves_the_others(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    expected, batch = trained("lora", reach_demonstrations, tmp_path / "lora"), windows(reach_demonstrations)
    policy = load_policy(tmp_path / "lora")
    shutil.copytree(tmp_path / "lora/adapter", tmp_path / "wrong")
    unseal(tmp_path / "wrong/eva_rl.json")
    config = tmp_path / "wrong/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    with pytest.raises(UserError, match="does not fit"):
        policy.adapters.add("wrong", tmp_path / "wrong")
    assert policy.adapters.names == ("default",)
    assert close(acted(policy, batch), expected)
    policy.adapters.add("again", tmp_path / "lora/adapter")
    assert close(acted(policy, batch), expected)


def test_choose_the_adapter_that_fits(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    reach = reach_demonstrations
    other = replace(reach, observations=np.ascontiguousarray(reach.observations[:, ::-1]))  # what is seen differs
    for name, data in {"reach": reach, "other": other}.items():
        policy, adapter = attached("eva", data)
        save_adapted_policy(tmp_path / name, policy, adapter, "card")
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base", adapters={name: tmp_path / name for name in ("other", "reach")})
    for name, data in {"reach": reach, "other": other}.items():
        scores = policy.adapters.choose(data, episodes=3)
        assert policy.adapters.active == name == next(iter(scores))
        assert set(scores) == {"reach", "other"}
        assert 0 < scores["reach"] <= 1.0001
    assert next(iter(policy.adapters.choose("reach-v3", steps=5, episodes=2))) == "reach"
    again = policy.adapters.choose("reach-v3", steps=5, episodes=2)
    assert again == policy.adapters.choose("reach-v3", steps=5, episodes=2), (
        "it acts alone, whatever was at work before"
    )
    for none in ({"steps": 0}, {"episodes": 0}):
        with pytest.raises(UserError, match=f"{next(iter(none))}=0"):
            policy.adapters.choose(reach, **none)
    alone = load_policy(tmp_path / "base").adapters
    with pytest.raises(UserError, match="no adapters to choose from"):
        alone.choose("reach-v3")
    with pytest.raises(UserError, match="no adapters to merge"):
        alone.merge()


def test_a_layer_that_saw_zeros_alone_says_nothing_of_a_task(
    tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    """As the one that embeds actions does in a first step."""
    save_policy(tmp_path / "base", make_policy())
    for name in "ab":
        policy, adapter = attached("lora", reach_demonstrations, targets=["embed_action", "q_proj"])
        save_adapted_policy(tmp_path / name, policy, adapter, "card")
    policy = load_policy(tmp_path / "base", adapters={name: tmp_path / name for name in "ab"})
    scores = policy.adapters.choose("reach-v3", steps=1, episodes=2)
    assert all(0 < score <= 1.0001 for score in scores.values())


def test_merging_asks_which_where_none_acts(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    trained("lora", reach_demonstrations, tmp_path / "push")
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base", adapters={"push": tmp_path / "push"})
    for merge in (policy.adapters.merge, policy.adapters.merge_and_unload):
        with pytest.raises(UserError, match=r"No adapter is active.*use\(NAME\) first: push"):
            merge()
    assert policy.adapters.names == ("push",)
    with pytest.raises(UserError, match=r"which of the adapters is merged \(push\)\. Leave it out"):
        load_policy(tmp_path / "base", merge=True, adapters={"push": tmp_path / "push"})


def test_named_adapters_can_be_trained_further(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    trained("lora", reach_demonstrations, tmp_path / "push")
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base", adapters={"push": tmp_path / "push"}, is_trainable=True)
    policy.adapters.use("push")
    batch = windows(reach_demonstrations)
    before = acted(policy, batch)
    train(policy, reach_demonstrations, policy.adapters.attached())
    assert not close(acted(policy, batch), before)


@pytest.mark.parametrize("name", ["train", "my.adapter", ""])
def test_a_name_that_pytorch_does_not_take_is_refused_as_such(
    name: str, tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    trained("lora", reach_demonstrations, tmp_path / "policy")
    save_policy(tmp_path / "base", make_policy())
    with pytest.raises(UserError, match=f"{name!r} cannot be the name of an adapter"):
        load_policy(tmp_path / "base", adapters={name: tmp_path / "policy"})


def test_an_adapter_is_added_from_wherever_it_is(tmp_path: Path, reach_demonstrations: Trajectories) -> None:
    expected, batch = trained("lora", reach_demonstrations, tmp_path / "run" / "policy"), windows(reach_demonstrations)
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    save_policy(tmp_path / "base", make_policy())
    policy = load_policy(tmp_path / "base")
    for name, path in {"a": str(tmp_path / "run" / "policy"), "b": tmp_path / "run" / "policy" / "adapter"}.items():
        policy.adapters.add(name, path)
        assert close(acted(policy, batch), expected)


def test_an_adapter_with_dropout_that_is_loaded_for_training_acts_without(
    tmp_path: Path, reach_demonstrations: Trajectories
) -> None:
    policy, adapter = attached("lora", reach_demonstrations, dropout=0.5)
    train(policy, reach_demonstrations, adapter)
    save_adapted_policy(str(tmp_path / "policy"), policy, adapter, "")
    save_policy(tmp_path / "base", make_policy())
    found = load_policy(tmp_path / "base")
    found.adapters.add("push", tmp_path / "policy", is_trainable=True)
    batch = windows(reach_demonstrations)
    assert torch.equal(acted(found, batch), acted(found, batch))
