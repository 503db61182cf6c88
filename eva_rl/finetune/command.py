"""``python -m eva_rl.finetune``: adapt a pretrained policy to a task, with the result on held-out goals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from eva_rl.adapters import count_parameters
from eva_rl.cli.command import run_command
from eva_rl.cli.parsing import register
from eva_rl.cli.profiling import peak_memory
from eva_rl.cli.run_dir import flat_hyperparameters
from eva_rl.configs.algorithms import ALGORITHMS
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.distributed import ProcessGroup
from eva_rl.finetune.adapter import attach
from eva_rl.finetune.phases import resume_step, train
from eva_rl.finetune.results import compare_snapshots, finish, report_start, snapshot, warn_of_worse_data
from eva_rl.finetune.session import open_session
from eva_rl.finetune.shared import evaluate_before, shared_eva
from eva_rl.launch.multirun import multirun
from eva_rl.tracking.tracker import open_tracker
from eva_rl.training.failures import failures_kept

HELP = """
Fine-tune a pretrained Decision Transformer policy on a task, and report its success before and after.

Examples:
  python -m eva_rl.finetune env=push-v3
  python -m eva_rl.finetune env=peg-unplug-side-v3 adapter=lora adapter.rank=4 algo.updates=800
  python -m eva_rl.finetune env=push-v3 data=demos.h5 policy=runs/mine/policy run_dir=runs/push
  python -m eva_rl.finetune env=stick-pull-v3 algo=bc_then_odt data.episodes=5 algo.env_steps=50000

The same command continues an unfinished run_dir.
"""


register("finetune", FinetuneConfig, {"algo": ALGORITHMS})


def finetune(config: FinetuneConfig) -> None:
    """Evaluate, initialise and attach the adapter, train, evaluate again, save."""
    session = open_session(config)
    phases = session.phases
    before, actions = evaluate_before(session)
    warn_of_worse_data(session.data, before)
    before_snapshot = snapshot(session, actions)
    phases.end("evaluate_before")
    loss_before = session.cloning_loss()
    adapter = attach(session.policy, session.sampler, config, partial(shared_eva, session))
    phases.end("adapter")
    resumed = resume_step(session)
    hyperparameters = flat_hyperparameters(config) | {
        f"settings/{k}": n for k, n in count_parameters(session.policy.network).items()
    }
    writes = ProcessGroup.current().is_main
    with open_tracker(session.run_dir, resumed, config.tracker, hyperparameters, writes=writes) as tracker:
        if resumed is None:
            tracker.log(before.metrics() | before.metrics("eval_before") | loss_before, 0)
        if adapter.start and resumed is None and ProcessGroup.current().is_main:
            report_start(session, adapter, tracker)
        tracker.watch(session.policy.network, config.algo.final_step)
        with failures_kept(session.run_dir), peak_memory(session.policy.device) as memory:
            steps = train(session, adapter, tracker)
        phases.end("train")
        after = session.evaluate("After")
        after_snapshot = snapshot(session, session.actions)
        steps |= session.cloning_loss()
        phases.end("evaluate_after")
        if ProcessGroup.current().is_main:
            finish(
                session, adapter, (before, after), {**steps, **memory, "processes": ProcessGroup.current().world_size}
            )
        loss = {key: steps[key] for key in loss_before}
        tracker.log(after.metrics() | loss, config.algo.final_step)  # last, so that no continued run can log it twice
        compare_snapshots(session, tracker, before_snapshot, after_snapshot)
        tracker.finished({**before.metrics("eval_before"), **after.metrics()})
    session.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("finetune", finetune, HELP, argv, multirun=multirun)
