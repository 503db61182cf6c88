"""What runs share by key: equal for equal work, different wherever the work differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.agents.policy_folder import save_policy
from eva_rl.cli.parsing import parse
from eva_rl.eva import EvaResult
from eva_rl.finetune import command  # noqa: F401 - registers its config
from eva_rl.finetune.adapter import activation_env_steps, attach
from eva_rl.finetune.locations import data_folder
from eva_rl.finetune.session import Session, make_sampler, open_session
from eva_rl.finetune.shared import before_key, eva_key, evaluate_before
from tests.conftest import make_policy

KEYS = {"before": before_key, "eva": eva_key}
SMALL = ["env=reach-v3", "env.horizon=10", "eval.episodes=1", "data.episodes=1", "data.only_successes=false"]
SMALL += ["data.workers=1", "threads=1"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("shared")
    save_policy(folder / "base", make_policy())
    config = parse("finetune", [*SMALL, f"policy={folder / 'base'}", f"run_dir={folder / 'run'}"])
    with open_session(config) as opened:
        yield opened


def with_scaling(value: float, return_scale: float = 200.0) -> DecisionTransformerPolicy:
    policy = make_policy()
    mean = policy.scaling.observation_mean.clone()
    mean[3] = value
    policy.scaling = replace(policy.scaling, observation_mean=mean, return_scale=return_scale)
    return policy


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_each_part_of_a_policy_has_its_part_in_the_key(key: Callable[[Session], str], session: Session) -> None:
    """Also those that are no weights, and numbers that differ in the fifth digit."""
    policies = [
        make_policy(),
        make_policy(seed=1),
        make_policy(context_length=4),
        make_policy(num_heads=4),
        with_scaling(0.12341),
        with_scaling(0.12344),
        with_scaling(0.0, return_scale=100.0),
    ]
    for policy in policies:
        policy.set_target_return(1000.0, session.spec.env_id)
    keys = [key(replace(session, policy=policy)) for policy in policies]
    assert len(set(keys)) == len(policies)
    assert keyed(session, key, 1000.0) == keys[0]


def keyed(session: Session, key: Callable[[Session], str], target_return: float, source: str = "auto") -> str:
    policy = make_policy()
    policy.set_target_return(target_return, session.spec.env_id)
    adapter = replace(session.config.adapter, eva=replace(session.config.adapter.eva, source=source))
    return key(replace(session, policy=policy, config=replace(session.config, adapter=adapter)))


def test_the_target_return_counts_where_the_policy_acts(session: Session) -> None:
    assert keyed(session, before_key, 1.0) != keyed(session, before_key, 2.0)
    for source in ("rollouts", "mixed"):
        assert keyed(session, eva_key, 1.0, source) != keyed(session, eva_key, 2.0, source)
    assert keyed(session, eva_key, 1.0) == keyed(session, eva_key, 2.0), "the data's returns are seen"


def test_what_is_asked_for_counts_where_windows_show_it(session: Session) -> None:
    shown = replace(session.config, data=replace(session.config.data, returns_to_go="asked"))
    asking = replace(session, config=shown)
    assert keyed(asking, eva_key, 1.0) != keyed(asking, eva_key, 2.0)
    assert eva_key(asking) != eva_key(session)
    both = [replace(config, shared="shared") for config in (session.config, shown)]
    folders = {data_folder(config, config.data, "a", Path("run")) for config in both}
    assert len(folders) == 1, "the same demonstrations are collected once"
    assert session.data is not None
    policy, first = make_policy(), session.data.offsets[:1]
    policy.set_target_return(3.0, session.spec.env_id)
    for config, expected in ((shown, 3.0), (session.config, float(session.data.returns[0]))):
        windows = make_sampler(policy, session.data, config, session.spec.env_id).windows(first)
        assert float(windows.returns_to_go[0, -1]) == pytest.approx(expected / policy.scaling.return_scale)


def test_tasks_are_told_apart_where_nothing_else_does(session: Session) -> None:
    """Meta-World's tasks have one protocol, and a policy asks the same of those that it does not know."""
    other = replace(session, spec=replace(session.spec, env_id="metaworld/push-v3"))
    other.policy.set_target_return(1.0, session.spec.env_id)
    other.policy.set_target_return(1.0, "metaworld/push-v3")
    assert before_key(other) != before_key(session)


def test_what_is_shared_is_scored_by_the_run_s_own_references(session: Session, tmp_path: Path) -> None:
    """A normalised score before training was that of the first run's data."""
    assert session.data is not None
    scored = []
    for highest in (1000.0, 4000.0):
        metadata = {"ref_min_score": "0", "ref_max_score": str(highest)}
        config = replace(session.config, shared=str(tmp_path))
        own = replace(session, config=config, data=replace(session.data, metadata=metadata), shared={})
        result, _ = evaluate_before(own, again=False)
        scored.append(result.metrics()["eval/normalized_score"])
    assert scored[0] == pytest.approx(4 * scored[1])


def test_successes_count_since_they_weigh_the_windows(session: Session) -> None:
    assert session.data is not None
    assert session.data.successes is not None
    other = replace(session.data, successes=~session.data.successes)
    assert eva_key(replace(session, data=other)) != eva_key(session)


@pytest.mark.parametrize("source", ["trajectories", "mixed", "rollouts"])
def test_a_shared_pass_is_rescaled_by_what_it_saw(source: str, session: Session) -> None:
    """Its moments are measured again: the forwards of rollouts counted as batches of demonstrations, and the env steps
    of the second pass not at all."""
    words = ["adapter.gain=lora", "adapter.rank=2", f"adapter.eva.source={source}", "adapter.eva.max_batches=2"]
    config = parse("finetune", [*SMALL, *words, "adapter.eva.rollout_envs=2", "adapter.eva.rollout_steps=10"])
    found: list[dict[str, Tensor]] = []
    for shared in (False, True):
        policy = make_policy()
        attach(policy, session.sampler, config, without_moments if shared else lambda compute: compute())
        found.append({name: p for name, p in policy.network.named_parameters() if ".lora_A." in name})
    for name, rows in found[0].items():
        torch.testing.assert_close(found[1][name], rows)
    passes = [activation_env_steps(one, has_data=True) for one in (config, replace(config, shared="shared"))]
    assert passes == ([0, 0] if source == "trajectories" else [20, 40])


def without_moments(compute: Callable[[], EvaResult]) -> EvaResult:
    return replace(compute(), moments={})
