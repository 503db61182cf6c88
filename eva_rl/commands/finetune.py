"""``python -m eva_rl.finetune``: adapt a pretrained policy to a task, with the result on held-out goals."""

from __future__ import annotations

from collections.abc import Sequence

from eva_rl.adapters import count_parameters
from eva_rl.commands.appearance import compare_looks, look_at, shown
from eva_rl.commands.attaching import attach
from eva_rl.commands.command import run_command
from eva_rl.commands.costs import peak_memory
from eva_rl.commands.finetune_options import FinetuneConfig
from eva_rl.commands.finetune_record import finish, report_eva
from eva_rl.commands.session import open_session
from eva_rl.commands.silence import open_tracker
from eva_rl.commands.training_phases import resume_step, train
from eva_rl.training.distributed import Ranks
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


def finetune(config: FinetuneConfig) -> None:
    """Evaluate, aim and attach the adapter, train, evaluate again, save."""
    session = open_session(config)
    phases = session.phases
    before = session.evaluate("Before")
    first_look = look_at(session)
    phases.end("evaluate_before")
    adapter = attach(session.policy, session.sampler, config)
    phases.end("adapter")
    resumed = resume_step(session)
    hyperparameters = shown(config) | {f"settings/{k}": n for k, n in count_parameters(session.policy.network).items()}
    with open_tracker(session.run_dir, resumed, config.tracker, hyperparameters) as tracker:
        if resumed is None:
            tracker.log(before.metrics() | before.metrics("eval_before"), 0)
        if adapter.eva is not None and resumed is None and Ranks.here().first:
            report_eva(session, adapter.eva, tracker)
        tracker.watch(session.policy.network, config.algo.final_step)
        with failures_kept(session.run_dir), peak_memory(session.policy.device) as memory:
            steps = train(session, adapter, tracker)
        phases.end("train")
        after = session.evaluate("After")
        last_look = look_at(session)
        phases.end("evaluate_after")
        if Ranks.here().first:
            finish(session, adapter, (before, after), {**steps, **memory, "processes": Ranks.here().count})
        tracker.log(after.metrics(), config.algo.final_step)  # last, so that no continued run can log it twice
        compare_looks(session, tracker, first_look, last_look)
        tracker.finished({**before.metrics("eval_before"), **after.metrics()})
    session.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("finetune", FinetuneConfig, finetune, HELP, argv)
