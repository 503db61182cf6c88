"""What a fine-tuning run leaves behind: its report, its policy folder, its summary, and the table at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.table import Table

from eva_rl import eva
from eva_rl.adapters import AttachedAdapter, count_parameters, save_adapted_policy
from eva_rl.agents import DecisionTransformerPolicy
from eva_rl.commands.cards import model_card
from eva_rl.commands.command import console
from eva_rl.commands.finetune_options import FinetuneConfig
from eva_rl.commands.runs import write_summary
from eva_rl.data import Trajectories
from eva_rl.evaluation import EvaluationResult
from eva_rl.files import write_json
from eva_rl.tracking import Tracker
from eva_rl.tracking.figures import rank_figure, spectrum_figure


@dataclass
class Phases:
    """Seconds spent in each phase of a run."""

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=perf_counter)

    def end(self, name: str) -> None:
        """Note the time since the previous phase ended."""
        now = perf_counter()
        self.seconds[name] = now - self._began
        self._began = now


def report_eva(
    run_dir: Path, result: eva.EvaResult, data: Trajectories, config: FinetuneConfig, tracker: Tracker
) -> None:
    """Write ``eva_report.json``, and show spectra and ranks."""
    origin = {"source": data.source, "hash": data.content_hash, "listened_to": config.adapter.eva.source}
    write_json(run_dir / "eva_report.json", {"data": origin, **result.to_report()})
    spectra = {name: layer.explained_variance_ratio.tolist() for name, layer in result.layers.items()}
    tracker.figure("eva/spectrum", spectrum_figure(spectra), 0)
    tracker.figure("eva/ranks", rank_figure({name: layer.rank for name, layer in result.layers.items()}), 0)


def finish(
    run_dir: Path,
    config: FinetuneConfig,
    policy: DecisionTransformerPolicy,
    adapter: AttachedAdapter,
    results: tuple[EvaluationResult, EvaluationResult],
    data: Trajectories,
    phases: Phases,
) -> None:
    """Write the policy folder and the summary, and show where everything lies."""
    before, after = results
    summary: dict[str, Any] = {
        "env": after.env_id,
        "method": config.adapter.method,
        "seed": config.seed,
        "policy": config.policy.path,
        "target_return": policy.conditioning.of(after.env_id),
        "protocol": after.protocol,
        **before.metrics("eval_before"),
        **after.metrics("eval"),
        **count_parameters(policy.network),
        "data": {
            "source": data.source,
            "hash": data.content_hash,
            "episodes": data.num_episodes,
            "steps": data.num_steps,
            "mean_return": float(data.returns.mean()),
        },
        "updates": config.algo.updates,
        "seconds": phases.seconds,
    }
    policy.env_id = after.env_id
    policy.metadata |= {
        "finetuned_on": after.env_id,
        "method": config.adapter.method,
        "protocol": after.protocol,
    }
    save_adapted_policy(run_dir / "policy", policy, adapter, model_card(summary))
    write_json(run_dir / "evaluation.json", {"before": before.record(), "after": after.record()})
    write_summary(run_dir, summary)
    show(run_dir, summary, results)


def show(run_dir: Path, summary: dict[str, Any], results: tuple[EvaluationResult, EvaluationResult]) -> None:
    """The table at the end."""
    before, after = results
    table = Table(title=f"{summary['env']}, {summary['method']}: {len(after.episodes)} held-out episodes")
    for column in ("", "before", "after"):
        table.add_column(column)
    if after.reports_success:
        intervals = [
            f"{r.success_rate:.2f}  [{r.success_interval()[0]:.2f}, {r.success_interval()[1]:.2f}]" for r in results
        ]
        table.add_row("success rate [95% interval]", *intervals)
    table.add_row("mean return", f"{before.mean_reward:.1f}", f"{after.mean_reward:.1f}")
    console.print(table)
    trainable, total = summary["trainable_parameters"], summary["total_parameters"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    console.print(f"Trained {trainable:,} of {total:,} parameters. Seconds: {seconds}.")
    console.print(f"Protocol: {summary['protocol']}.", soft_wrap=True)
    console.print(
        f"Policy:      {run_dir / 'policy'}\nTensorBoard: tensorboard --logdir {run_dir / 'tb'}",
        soft_wrap=True,
    )
