"""Metrics to metrics.jsonl, TensorBoard and other trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eva_rl.lazy import lazy_names

if TYPE_CHECKING:
    from eva_rl.tracking.sinks import TRACKERS, check_trackers
    from eva_rl.tracking.tracker import Resume, Tracker

__all__ = [
    "TRACKERS",
    "Resume",
    "Tracker",
    "check_trackers",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Resume": "eva_rl.tracking.tracker",
        "TRACKERS": "eva_rl.tracking.sinks",
        "Tracker": "eva_rl.tracking.tracker",
        "check_trackers": "eva_rl.tracking.sinks",
    },
)
