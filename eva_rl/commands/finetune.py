"""``python -m eva_rl.finetune``: adapt a pretrained policy to a task, with the result on held-out goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from eva_rl import envs
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.commands.attaching import attach, check_adapter
from eva_rl.commands.command import run_command
from eva_rl.commands.demonstrations import load_task_data, sampling_weights, target_return
from eva_rl.commands.finetune_options import FinetuneConfig
from eva_rl.commands.finetune_record import Phases, finish, report_eva
from eva_rl.commands.outputs import data_references
from eva_rl.commands.policies import open_policy
from eva_rl.commands.pretrain import bc_options
from eva_rl.commands.progress import counting_progress, training_progress
from eva_rl.commands.runs import open_run, prepare_machine
from eva_rl.data import Trajectories, WindowSampler
from eva_rl.data.prefetch import prefetching
from eva_rl.evaluation import EvaluationResult, evaluate, evaluation_envs
from eva_rl.seeding import VALIDATION
from eva_rl.tracking import Tracker
from eva_rl.training.bc import train_bc
from eva_rl.training.checkpoint import load_latest_checkpoint

HELP = """
Fine-tune a pretrained Decision Transformer policy on a task, and report its success before and after.

Examples:
  python -m eva_rl.finetune env=push-v3
  python -m eva_rl.finetune env=peg-unplug-side-v3 adapter=lora adapter.rank=4 algo.updates=800
  python -m eva_rl.finetune env=push-v3 data=demos.h5 policy=runs/mine/policy run_dir=runs/push

The same command continues an unfinished run_dir.
"""


def finetune(config: FinetuneConfig) -> None:
    """Evaluate, aim and attach the adapter, train, evaluate again, save."""
    device = prepare_machine(config)
    spec = envs.env_spec(config.env.id, config.env.horizon)
    policy = open_policy(config.policy, device, merge=True)
    policy.check_dimensions(spec.observation_dim, spec.action_dim, spec.env_id)
    check_adapter(policy, config.adapter)
    run_dir = open_run("finetune", config)
    phases = Phases()
    data = load_task_data(spec.env_id, config.data, run_dir / "data", config.env.horizon)
    policy.check_dimensions(data.observation_dim, data.action_dim, data.source)
    asked = config.policy.target_return
    policy.with_target(target_return(data) if asked is None else asked, spec.env_id)
    sampler = make_sampler(policy, data, config)
    phases.end("data")
    vec_env = evaluation_envs(spec.env_id, config.eval.episodes, config.env.horizon)
    play = partial(
        evaluate,
        policy,
        config.env.id,
        horizon=config.env.horizon,
        seed=config.eval.seed,
        references=data_references(data),
        vec_env=vec_env,
    )
    before = _with_bar("Before", play, config.eval.episodes)
    phases.end("evaluate_before")
    adapter = attach(policy, sampler, config)
    phases.end("adapter")
    resumed = load_latest_checkpoint(run_dir / "checkpoint")
    with Tracker(run_dir, None if resumed is None else resumed.step) as tracker:
        if resumed is None:
            tracker.log(before.metrics(), 0)
        if adapter.eva is not None and resumed is None:
            report_eva(run_dir, adapter.eva, data, config, tracker)
        with training_progress(config.algo.updates) as bar, prefetching(sampler, device) as ahead:
            train_bc(
                policy,
                ahead,
                bc_options(config.algo, config.eval.every, config.checkpoint.every),
                log=bar.also(tracker.log),
                evaluate=lambda _: play(episodes=config.eval.quick_episodes, purpose=VALIDATION).metrics("validation"),
                checkpoint_dir=run_dir / "checkpoint",
                extension=adapter.extension,
            )
        phases.end("train")
        after = _with_bar("After", play, config.eval.episodes)
        phases.end("evaluate_after")
        finish(run_dir, config, policy, adapter, (before, after), data, phases)
        tracker.log(after.metrics(), config.algo.updates)  # last, so that no continued run can log it twice
    vec_env.close()


def make_sampler(policy: DecisionTransformerPolicy, data: Trajectories, config: FinetuneConfig) -> WindowSampler:
    """Windows as the policy sees them, in an order that the seed decides."""
    return WindowSampler(
        data,
        policy.network.config.context_length,
        policy.scaling,
        seed=config.seed,
        weights=sampling_weights(data, config.data.after_success, config.data.weight_by),
    )


def _with_bar(name: str, play: Callable[..., EvaluationResult], episodes: int) -> EvaluationResult:
    """The held-out evaluation, behind a progress bar."""
    with counting_progress(f"{name:8s}", episodes) as advance:
        return play(episodes=episodes, on_episode=advance)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("finetune", FinetuneConfig, finetune, HELP, argv)
