"""``python -m eva_rl.finetune``: adapt a pretrained policy to a task, with the result on held-out goals."""

from __future__ import annotations

from collections.abc import Sequence

from eva_rl.cli.command import run_command
from eva_rl.cli.parsing import register
from eva_rl.configs.algorithms import ALGORITHMS
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.envs.registry import canonical_id

HELP = """
Fine-tune a pretrained Decision Transformer policy on a task, and report its success before and after.

Examples:
  python -m eva_rl.finetune env=push-v3
  python -m eva_rl.finetune env=peg-unplug-side-v3 adapter=lora adapter.rank=4 algo.updates=800
  python -m eva_rl.finetune env=push-v3 data=demos.h5 policy=runs/mine/policy run_dir=runs/push
  python -m eva_rl.finetune env=stick-pull-v3 algo=bc_then_self_imitation data.episodes=2

The same command continues an unfinished run_dir.
"""


register("finetune", FinetuneConfig, {"algo": ALGORITHMS})


def finetune(config: FinetuneConfig) -> None:
    """Evaluate, initialise and attach the adapter, train, evaluate again, write the results."""
    canonical_id(config.env.id)  # a misspelt task is refused before torch is imported, as --help is answered
    from eva_rl.finetune.phases import initialise_adapter, train
    from eva_rl.finetune.results import evaluate_first, evaluate_last, open_record, write_results
    from eva_rl.finetune.session import open_session

    with open_session(config) as session:
        before = evaluate_first(session)
        adapter = initialise_adapter(session)
        with open_record(session, adapter, before) as tracker:
            training = train(session, adapter, tracker)
            after = evaluate_last(session)
            write_results(session, adapter, tracker, (before, after), training)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run_command("finetune", finetune, HELP, argv, multirun="eva_rl.launch.multirun", continues=True)
