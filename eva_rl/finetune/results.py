"""What a fine-tuning run leaves behind: its report, its policy folder, its summary, and the table at the end."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from eva_rl.adapters import AttachedAdapter, LayerStart, adapter_bytes, count_parameters, save_adapted_policy
from eva_rl.adapters.model_card import card_facts, model_card
from eva_rl.cli.console import console, counting_progress, say
from eva_rl.cli.run_dir import PHASES_FILE, flat_hyperparameters, write_summary
from eva_rl.configs.algorithms import BCAlgo, OnlineAlgo
from eva_rl.configs.finetune import FinetuneConfig
from eva_rl.data import Trajectories
from eva_rl.errors import counted
from eva_rl.eva import EvaResult
from eva_rl.files import write_json
from eva_rl.finetune.adapter import activation_source
from eva_rl.finetune.phases import Training
from eva_rl.finetune.session import Session
from eva_rl.finetune.shared import evaluate_before
from eva_rl.rollouts.evaluation import EvaluationResult, described_return, other_starts
from eva_rl.rollouts.video import Clip, record_clip, side_by_side, write_video
from eva_rl.tracking import Tracker
from eva_rl.tracking.figures import action_figure, rank_figure, spectrum_figure
from eva_rl.tracking.tracker import WALL_TIME, by_training_step, open_tracker, read_metrics
from eva_rl.training.failures import failures_kept

DASHBOARD = "#custom_scalars&_smoothingWeight=0"
"""TensorBoard's start page; smoothing, which distorts curves of few points, is off."""


WORSE = 0.9
"""Share of the policy's own return below which even the best demonstration is worse than the policy."""
FRAMES = 100
"""Frames of a video, about."""


def report_start(session: Session, adapter: AttachedAdapter, tracker: Tracker) -> None:
    """Write ``eva_report.json``: gain and effective rank of the start, and what EVA found, with spectra and ranks."""
    start = {"start": {name: asdict(layer) for name, layer in adapter.start.items()}}
    tracker.log(start_metrics(adapter.start), 0)
    if adapter.eva is not None:
        _report_eva(session, adapter.eva, start, tracker)
    else:
        write_json(session.run_dir / "eva_report.json", start)


def start_metrics(start: Mapping[str, LayerStart]) -> dict[str, float]:
    """Means over layers."""
    if not start:
        return {}
    layers = start.values()
    return {
        "eva/gain": sum(layer.gain for layer in layers) / len(layers),
        "eva/effective_rank": sum(layer.effective_rank for layer in layers) / len(layers),
    }


def _report_eva(session: Session, result: EvaResult, start: Mapping[str, Any], tracker: Tracker) -> None:
    origin: dict[str, Any] = {"activation_source": activation_source(session.config, session.data is not None)}
    if session.data is not None:
        origin |= {"source": session.data.source, "hash": session.data.content_hash}
    write_json(session.run_dir / "eva_report.json", {"data": origin, **start, **result.to_report()})
    tracker.log(_eva_metrics(result), 0)
    spectra = {name: layer.explained_variance_ratio.tolist() for name, layer in result.layers.items()}
    ranks = {name: layer.rank for name, layer in result.layers.items()}
    tracker.figure("eva/spectrum", partial(spectrum_figure, spectra), 0)
    tracker.figure("eva/ranks", partial(rank_figure, ranks), 0)


def _eva_metrics(result: EvaResult) -> dict[str, float]:
    layers = result.layers.values()
    agreements = [layer.split_half_agreement for layer in layers if not math.isnan(layer.split_half_agreement)]
    return {
        "eva/explained_variance": sum(layer.explained_variance for layer in layers) / len(layers),
        "eva/rows": result.rows,
        "time/eva_seconds": result.seconds,
        **({"eva/agreement_min": min(agreements)} if agreements else {}),
    }


@dataclass(frozen=True)
class Evaluated:
    """A held-out evaluation, and what is shown beside it.

    Attributes:
        result: The episodes.
        snapshot: How the policy acted.
        loss: Cloning loss on held-out demonstrations; empty where there are none.
    """

    result: EvaluationResult
    snapshot: PolicySnapshot
    loss: Mapping[str, float]


def evaluate_first(session: Session) -> Evaluated:
    """Evaluate the pretrained policy; runs of a study share this, and a run that continues has it."""
    result, actions = evaluate_before(session, again=session.resumed is None)
    warn_of_worse_data(session.data, result)
    found = Evaluated(result, snapshot(session, actions), session.cloning_loss())
    session.phases.end("evaluate_before")
    return found


def evaluate_last(session: Session) -> Evaluated:
    """Evaluate the fine-tuned policy; that its actions are not finite is noted."""
    with failures_kept(session.run_dir):
        result, actions = session.evaluate("After")
    found = Evaluated(result, snapshot(session, actions), session.cloning_loss())
    session.phases.end("evaluate_after")
    return found


def open_record(session: Session, adapter: AttachedAdapter, before: Evaluated) -> Tracker:
    """Open the tracker, where the run goes on or afresh with the evaluation before and the adapter's start."""
    config, network, resumed = session.config, session.policy.network, session.resumed
    counts = {f"settings/{name}": number for name, number in count_parameters(network).items()}
    writes = session.process_group.is_main
    hyperparameters = flat_hyperparameters(config) | counts
    tracker = open_tracker(session.run_dir, resumed, config.tracker, hyperparameters, writes=writes)
    if writes:
        _keep_seconds(session)
    if resumed is None:
        tracker.log({**before.result.metrics(), **before.result.metrics("eval_before"), **before.loss}, 0)
    if adapter.start and resumed is None and writes:
        report_start(session, adapter, tracker)
    tracker.watch(network, config.algo.final_step)
    return tracker


def _keep_seconds(session: Session) -> None:
    """Count the seconds of earlier processes up to the last point that the run builds on, as the record now holds."""
    resumed = session.resumed
    file = session.run_dir / PHASES_FILE
    if resumed is None:
        session.phases.keep(file)
        return
    last = max((row[WALL_TIME] for row in read_metrics(session.run_dir)), default=0.0)
    session.phases.keep(file, "clone" if resumed.cloning else "train", last)


def write_results(
    session: Session,
    adapter: AttachedAdapter,
    tracker: Tracker,
    evaluations: tuple[Evaluated, Evaluated],
    training: Training,
) -> None:
    """Write the last points of the record, the policy folder and, as the very last, the summary that ends the run.

    Args:
        session: The run.
        adapter: What was trained.
        tracker: The record.
        evaluations: Before and after.
        training: What lies between them.
    """
    before, after = evaluations
    last = int(training.costs.get("env_steps_played", session.config.algo.final_step))
    tracker.log_once({**after.result.metrics(), **after.loss}, last)
    compare_snapshots(session, tracker, before.snapshot, after.snapshot, last)
    tracker.finished({**before.result.metrics("eval_before"), **after.result.metrics()})
    if session.process_group.is_main:
        evaluated = {"before": before.result, **training.between, "after": after.result}
        _write_policy_and_summary(session, adapter, evaluated, {**training.costs, **after.loss})


def _write_policy_and_summary(
    session: Session,
    adapter: AttachedAdapter,
    evaluations: Mapping[str, EvaluationResult],
    costs: Mapping[str, float],
) -> None:
    """Write the policy folder and the summary, and show where everything lies."""
    before, after = evaluations["before"], evaluations["after"]
    policy, run_dir = session.policy, session.run_dir
    summary = _summary(session, (before, after)) | dict(costs) | start_metrics(adapter.start)
    summary["seconds"] = session.phases.seconds
    summary |= _of_study(session)
    policy.env_id = after.env_id
    policy.metadata |= {"finetuned_on": after.env_id, "method": summary["method"], "protocol": after.protocol}
    policy.metadata["finetuning"] = card_facts(summary)
    card = model_card(summary, "full" if adapter.model is None else "adapter")
    save_adapted_policy(run_dir / "policy", policy, adapter, card)
    summary["adapter_bytes"] = adapter_bytes(run_dir / "policy") or 4 * summary["trainable_parameters"]
    write_json(run_dir / "evaluation.json", {name: result.record() for name, result in evaluations.items()})
    write_summary(run_dir, summary)
    show(run_dir, summary, evaluations)


def _summary(session: Session, results: tuple[EvaluationResult, EvaluationResult]) -> dict[str, Any]:
    config, (before, after) = session.config, results
    return {
        "env": after.env_id,
        "method": config.adapter.method,
        "algo": config.algo.name,
        "seed": config.seed,
        **_learning_rate(config),
        "policy": session.policy_name,
        "target_return": session.policy.conditioning.of(after.env_id),
        "protocol": after.protocol,
        **before.metrics("eval_before"),
        **after.metrics("eval"),
        **count_parameters(session.policy.network),
        "data": None if session.data is None else _about(session.data),
    }


def _learning_rate(config: FinetuneConfig) -> dict[str, float]:
    """The peak of cloning, as a number also where it was chosen by the method."""
    algo = config.algo
    cloning = algo.bc if isinstance(algo, OnlineAlgo) else algo
    return {"learning_rate": float(cloning.learning_rate)} if isinstance(cloning, BCAlgo) and cloning.updates else {}


def _of_study(session: Session) -> dict[str, Any]:
    """What only runs of a study have: evaluations by step of training, shared work by key, the study file's digest."""
    config = session.config
    rows = read_metrics(session.run_dir) if config.eval.at else []
    found = {f"{step:.0f}": held_out for step, row in by_training_step(rows) if (held_out := _held_out(row))}
    parts = {"eval_at": found, "shared": session.shared, "study": config.study}
    return {key: value for key, value in parts.items() if value}


def _held_out(row: Mapping[str, Any]) -> dict[str, float]:
    """The evaluation of that row, unless it has a name of its own, as those before and between the phases have."""
    found = {key: value for key, value in row.items() if key.startswith("eval/")}
    return {} if any(key.startswith("eval_") for key in row) else found


def _about(data: Trajectories) -> dict[str, Any]:
    return {
        "source": data.source,
        "hash": data.content_hash,
        "episodes": data.num_episodes,
        "steps": data.num_steps,
        "mean_return": float(data.returns.mean()),
    }


def warn_of_worse_data(data: Trajectories | None, before: EvaluationResult) -> None:
    """Warn where cloning the demonstrations would make a policy that is better than they are worse."""
    if data is None or before.stopped_at_success:
        return
    if data.returns.max() < before.mean_reward - (1 - WORSE) * abs(before.mean_reward):
        say(
            f"[bold yellow]Warning:[/] the best demonstration has a return of {data.returns.max():.0f}, "
            f"the policy {before.mean_reward:.0f} on average: cloning will make it worse. Use better data (data=), "
            "or learn online: algo=odt_td3 data=none.",
            markup=True,
        )


def show(run_dir: Path, summary: dict[str, Any], evaluations: Mapping[str, EvaluationResult]) -> None:
    """The table at the end, with a column for each evaluation."""
    after = evaluations["after"]
    episodes = counted(len(after.episodes), "held-out episode")
    table = Table(title=f"{summary['env']}, {summary['method']}: {episodes}")
    for column in ("", *evaluations):
        table.add_column(column)
    if after.reports_success:
        table.add_row("success rate [95% interval]", *map(_success_of, evaluations.values()))
    table.add_row("mean return", *(described_return(result) for result in evaluations.values()))
    scores = [result.metrics("").get("/normalized_score") for result in evaluations.values()]
    if None not in scores:
        table.add_row("normalised score (0-100)", *(f"{score:.1f}" for score in scores))
    console.print(table)
    trainable, total = summary["trainable_parameters"], summary["total_parameters"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())
    say(f"Trained {trainable:,} of {total:,} parameters. Seconds: {seconds}.")
    if "eva/gain" in summary:
        say(
            f"Initial A, mean over layers: gain {summary['eva/gain']:.3g}, effective rank "
            f"{summary['eva/effective_rank']:.1f}."
        )
    say(f"Protocol: {summary['protocol']}.")
    for caveat in (after.caveat, other_starts(evaluations["before"], after)):
        if caveat:
            say(caveat)
    say(
        f"Policy:      {run_dir / 'policy'}\n"
        f"TensorBoard: tensorboard --logdir {shlex.quote(str(run_dir / 'tb'))}, then http://localhost:6006/{DASHBOARD}",
    )


def _success_of(result: EvaluationResult) -> str:
    """The rate and its interval; a dash where the environment told nothing of success."""
    if not result.reports_success:
        return "-"
    low, high = result.success_interval()
    return f"{result.success_rate:.2f}  [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class PolicySnapshot:
    """How the policy acts.

    Attributes:
        actions: (N, act), of the last evaluation (in a run of several processes: the first one's part).
        clip: One episode, where ``video=true`` asks for it.
    """

    actions: NDArray[np.float32]
    clip: Clip | None


def snapshot(session: Session, actions: NDArray[np.float32]) -> PolicySnapshot:
    """How the policy acts after an evaluation; records a video of one episode if ``video=true``.

    Raises:
        UserError: There is no renderer on this machine.
    """
    config = session.config
    if not config.video or not session.process_group.is_main:
        return PolicySnapshot(actions, None)
    every = max(2, session.spec.horizon // FRAMES)
    with counting_progress("Filming (env steps)", session.spec.horizon) as advance:
        clip = record_clip(
            session.policy,
            config.env.id,
            seed=config.eval.seed,
            horizon=config.env.horizon,
            every=every,
            on_step=advance,
        )
    return PolicySnapshot(actions, clip)


def compare_snapshots(
    session: Session, tracker: Tracker, before: PolicySnapshot, after: PolicySnapshot, last: int
) -> None:
    """Show two snapshots, of step 0 and of the last one: histograms of actions, and the videos side by side."""
    for index in range(before.actions.shape[1]):
        for acted, step in ((before, 0), (after, last)):
            tracker.histogram(f"eval/action_{index}", acted.actions[:, index], step)
    tracker.figure("eval/actions", partial(action_figure, before.actions, after.actions), last)
    if before.clip is None or after.clip is None:
        return
    frames = side_by_side(before.clip.captioned("before"), after.clip.captioned("after"))
    path = session.run_dir / "videos" / f"{session.spec.env_id.replace('/', '-')}.gif"
    for written in write_video(path, frames):
        say(f"Video:       {written}")
    tracker.video("eval/before_and_after", path, last)
