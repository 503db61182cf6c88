"""The same global batch on 1, 2 and 4 processes; a killed process; commands under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import eva_rl
from eva_rl.adapters import attach_adapter
from eva_rl.batch import WindowBatch
from eva_rl.data import Trajectories, WindowSampler, read_episodes, write_episodes
from eva_rl.data.samplers import ShardedSampler
from eva_rl.distributed import ProcessGroup
from eva_rl.errors import UserError
from eva_rl.rollouts.evaluation import MultiTaskValidator, evaluate_distributed, shared_envs
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import Checkpoints
from eva_rl.training.losses import clone_loss, microbatches, num_action_elements, summed_action_loss
from eva_rl.training.options import BCOptions
from tests.conftest import make_policy

OPTIONS = BCOptions(updates=6, batch_size=10, warmup_steps=2, log_every=1)


def make_sampler(data: Trajectories, policy: Any, seed: int = 1) -> WindowSampler:
    """Windows mostly from the beginning of episodes, so that the processes' masks differ."""
    weights = np.zeros(data.num_steps)
    for start in data.offsets[:-1]:
        weights[start : start + 6] = 1
    return WindowSampler(data, 6, policy.scaling, seed=seed, weights=weights)


def clone(data: Trajectories, options: BCOptions, folder: Path | None, adapter: str = "") -> dict[str, Any]:
    """Train on this process's share; the losses, the weights, the windows seen."""
    torch.manual_seed(5)
    policy, process_group = make_policy(), ProcessGroup.current()
    attached = attach_adapter(policy, adapter, rank=2, total_updates=options.updates) if adapter else None
    logged: list[float] = []
    train_bc(
        policy,
        ShardedSampler(make_sampler(data, policy), process_group),
        options,
        log=lambda metrics, step: logged.append(metrics["train/loss"]),
        checkpoints=Checkpoints(folder, 3) if folder else None,
        extension=attached.extension if attached else None,
    )
    return {"losses": logged, "weights": {k: v.clone() for k, v in policy.network.state_dict().items()}}


def look(episodes: int) -> dict[str, Any]:
    """Evaluations, divided among the processes."""
    process_group, policy = ProcessGroup.current(), make_policy()
    vec_env = shared_envs(process_group, "reach-v3", episodes, 20)
    play = partial(eva_rl.evaluate_policy, policy, "reach-v3", horizon=20, vec_env=vec_env)
    result = evaluate_distributed(process_group, play, episodes=episodes)
    return {"episodes": result.episodes, "protocol": result.protocol}


def look_at_tasks() -> dict[str, float]:
    """Success of an expert-like policy on three tasks, each on one process."""
    tasks = ["metaworld/reach-v3", "metaworld/push-v3", "metaworld/window-close-v3"]
    return MultiTaskValidator.of(ProcessGroup.current(), tasks).scores(make_policy(), 1, 7)


def worker(rank: int, world: int, folder: str, work: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        outcome = work()
    except UserError as error:
        outcome = str(error)
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def together(folder: Path, world: int, work: Any) -> list[Any]:
    folder.mkdir()
    mp.spawn(worker, (world, str(folder), work), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def demonstrations(reach_demonstrations: Trajectories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reach.h5"
    write_episodes(path, reach_demonstrations)
    return path


def clone_file(path: Path, options: BCOptions, folder: Path | None, adapter: str = "") -> dict[str, Any]:
    return clone(read_episodes(path), options, folder, adapter)


def both(path: Path, options: BCOptions, folder: Path, episodes: int) -> dict[str, Any]:
    return clone_file(path, options, folder) | look(episodes)


def assert_same_training(alone: dict[str, Any], outcomes: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(outcomes[0]["losses"], alone["losses"], rtol=1e-5)
    for outcome in outcomes:
        assert outcome["losses"] == (outcomes[0]["losses"] if outcome is outcomes[0] else []), "the first alone logs"
        for name, value in alone["weights"].items():
            torch.testing.assert_close(outcome["weights"][name], value, atol=tolerance, rtol=0)
            assert torch.equal(outcome["weights"][name], outcomes[0]["weights"][name]), name


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(tmp_path: Path, demonstrations: Path) -> None:
    alone = both(demonstrations, OPTIONS, tmp_path / "alone", 3)
    first, second = together(tmp_path / "two", 2, partial(both, demonstrations, OPTIONS, tmp_path / "parts", 3))
    assert_same_training(alone, [first, second])
    for outcome in (first, second):
        assert outcome["protocol"] == alone["protocol"]
        assert [e.episode_seed for e in outcome["episodes"]] == [e.episode_seed for e in alone["episodes"]]
        returns = [[e.episode_return for e in found["episodes"]] for found in (outcome, alone)]
        np.testing.assert_allclose(*returns, rtol=1e-4)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["step_000000003", "step_000000006"]
    more = replace(OPTIONS, updates=9)  # the learning rate's cosine is another, for both alike
    resumed = clone_file(demonstrations, more, tmp_path / "parts")
    whole = clone_file(demonstrations, more, tmp_path / "alone")
    assert len(resumed["losses"]) == 3
    np.testing.assert_allclose(resumed["losses"], whole["losses"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["", "adalora"])
def test_four_processes_train_as_one(tmp_path: Path, demonstrations: Path, adapter: str) -> None:
    options = replace(OPTIONS, updates=12, accumulate=2)
    alone = clone_file(demonstrations, options, None, adapter)
    outcomes = together(tmp_path / "four", 4, partial(clone_file, demonstrations, options, None, adapter))
    assert_same_training(alone, outcomes, 1e-4)


def test_parts_of_a_batch_and_unequal_masks_give_the_gradient_of_the_whole(reach_demonstrations: Trajectories) -> None:
    policy = make_policy()
    batch = make_sampler(reach_demonstrations, policy).sample(11, 0)

    def gradient(loss: Tensor) -> Tensor:
        policy.network.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.network.parameters() if p.grad is not None])

    whole = gradient(clone_loss(policy.network, batch))
    numbers = num_action_elements(batch)
    pieces = list(microbatches(batch, 4))
    assert [len(piece) for piece in pieces] == [2, 3, 3, 3]
    summed = gradient(
        sum((summed_action_loss(policy.network, p, "mse") / numbers for p in pieces), torch.zeros(())).float()
    )
    torch.testing.assert_close(summed, whole, atol=1e-6, rtol=1e-5)
    averaged = gradient(sum((clone_loss(policy.network, p) / len(pieces) for p in pieces), torch.zeros(())))
    assert (averaged - whole).abs().max() > 1e-3, "the mean of the parts' means is another gradient"


def test_accumulation_trains_as_the_whole_batch(reach_demonstrations: Trajectories) -> None:
    whole = clone(reach_demonstrations, OPTIONS, None)
    accumulated = clone(reach_demonstrations, replace(OPTIONS, accumulate=4), None)
    assert_same_training(whole, [accumulated])


def test_shares_cover_a_batch_without_overlap(reach_demonstrations: Trajectories) -> None:
    policy = make_policy()
    sampler = make_sampler(reach_demonstrations, policy)
    whole = sampler.sample(11, 3)
    shares = [ShardedSampler(sampler, ProcessGroup(i, 4)).sample(11, 3) for i in range(4)]
    assert torch.equal(torch.cat([share.observations for share in shares]), whole.observations)
    with pytest.raises(UserError, match="batch_size=3: expected at least one window a process, and there are 4"):
        ShardedSampler(sampler, ProcessGroup(0, 4)).sample(3, 0)


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_halves_are_those_of_one_process(processes: int, reach_demonstrations: Trajectories) -> None:
    """EVA cuts what each process sees in the middle, and stops where the two halves of all agree."""
    sampler = make_sampler(reach_demonstrations, make_policy())
    whole = sampler.sample(14, 3).observations
    groups = [ProcessGroup(rank, processes) for rank in range(processes)]
    shares = [ShardedSampler(sampler, group, halves=True).sample(14, 3).observations for group in groups]
    cuts = [len(share) // 2 for share in shares]
    assert torch.equal(torch.cat([share[:cut] for share, cut in zip(shares, cuts, strict=True)]), whole[:7])
    assert torch.equal(torch.cat([share[cut:] for share, cut in zip(shares, cuts, strict=True)]), whole[7:])
    few = [ShardedSampler(sampler, group, halves=True).sample(processes, 3) for group in groups]
    assert [len(share) for share in few] == [1] * processes


def test_bfloat16_comes_close(reach_demonstrations: Trajectories) -> None:
    exact = clone(reach_demonstrations, OPTIONS, None)["losses"]
    mixed = clone(reach_demonstrations, replace(OPTIONS, precision="bfloat16"), None)["losses"]
    assert mixed != exact
    np.testing.assert_allclose(mixed, exact, rtol=0.02)


@pytest.mark.slow
def test_compiled_training_is_the_same(reach_demonstrations: Trajectories) -> None:
    exact = clone(reach_demonstrations, OPTIONS, None)["losses"]
    compiled = clone(reach_demonstrations, replace(OPTIONS, compile="default"), None)["losses"]
    np.testing.assert_allclose(compiled, exact, rtol=1e-4)


@pytest.mark.slow
def test_tasks_are_divided(tmp_path: Path) -> None:
    alone = look_at_tasks()
    assert list(alone) == ["metaworld/reach-v3", "metaworld/push-v3", "metaworld/window-close-v3"]
    assert together(tmp_path / "tasks", 2, look_at_tasks) == [alone, alone]


class Dying(nn.Module):
    """A network whose process is killed at its third step."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, batch: WindowBatch) -> Tensor:
        self.calls += 1
        if self.calls == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        out: Tensor = self.network(batch)
        return out


def die(path: Path) -> Any:
    policy = make_policy()
    policy.network = Dying(policy.network)  # type: ignore[assignment]
    sampler = ShardedSampler(make_sampler(read_episodes(path), policy), ProcessGroup.current())
    return train_bc(policy, sampler, OPTIONS, log=lambda metrics, step: None)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_message(tmp_path: Path, demonstrations: Path) -> None:
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(i, 2, str(tmp_path), partial(die, demonstrations))) for i in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert processes[1].exitcode == -signal.SIGKILL
    said = torch.load(tmp_path / "0.pt", weights_only=False)
    assert "Another process of this run has ended" in said
    assert "rerun the same command" in said


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--main_process_port=0", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--num_processes")  # fmt: skip


def start(launcher: tuple[str, ...], processes: int, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, str(processes), "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_the_command_under_launchers(tmp_path: Path, policy_folder: Path) -> None:
    arguments = [f"policy={policy_folder}", "env=reach-v3", "env.horizon=40", "data.episodes=2", "data.workers=1"]
    arguments += ["data.only_successes=false", "algo.updates=4", "algo.batch_size=8", "adapter.rank=2", "threads=1"]
    arguments += ["adapter.eva.max_batches=2", "eval.episodes=3", "eval.every=2", "eval.quick_episodes=2"]
    launches = {"one": (TORCHRUN, 1), "two": (TORCHRUN, 2), "accelerate": (ACCELERATE, 2)}
    for name, launch in launches.items():
        process = start(*launch, "eva_rl.finetune", *arguments, f"run_dir={tmp_path / name}")
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        assert output.count("Trained ") == 1, "the first process alone speaks"
    summaries = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in launches}
    assert [summary["processes"] for summary in summaries.values()] == [1, 2, 2]
    losses = {}
    for name in launches:
        report = json.loads((tmp_path / name / "eva_report.json").read_text())
        rows = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["train/loss"] for row in rows if "train/loss" in row], report["rows"]
    for name in ("two", "accelerate"):
        assert summaries[name]["eval/mean_reward"] == pytest.approx(summaries["one"]["eval/mean_reward"], rel=1e-3)
        assert losses[name][0] == pytest.approx(losses["one"][0], rel=1e-4)
        assert losses[name][1] == losses["one"][1]


@pytest.mark.slow
def test_a_killed_rank_ends_torchrun_and_another_number_of_processes_continues(tmp_path: Path) -> None:
    arguments = ["eva_rl.pretrain", "env=reach-v3", "env.horizon=40", "data.episodes=2", "data.workers=1", "threads=1"]
    arguments += ["data.only_successes=false", "size.hidden_size=16", "size.num_layers=1", "size.num_heads=2"]
    arguments += ["size.context_length=5", "algo.updates=3000", "algo.batch_size=8", "eval.every=0"]
    arguments += ["checkpoint.every=10", f"run_dir={tmp_path / 'run'}"]
    process = start(TORCHRUN, 2, *arguments)
    deadline = time.monotonic() + 500
    while not list((tmp_path / "run" / "checkpoint").glob("step_*")):
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.2)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "SIGKILL" in output or "Signal 9" in output
    assert not (tmp_path / "run" / "summary.json").exists()
    from eva_rl import pretrain
    from eva_rl.training.checkpoint import load_latest_checkpoint

    state = load_latest_checkpoint(tmp_path / "run" / "checkpoint")
    assert state is not None
    reached = max(state.step, 10)
    assert reached < 3000
    assert pretrain.main(arguments[1:]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == sorted(set(steps)), "no step is recorded twice"
    assert steps[-1] == 3000
