"""One dictionary of metrics, in every place it is looked at."""

from eva_rl.tracking.sinks import TRACKERS, check_trackers
from eva_rl.tracking.tracker import Resume, Tracker

__all__ = ["TRACKERS", "Resume", "Tracker", "check_trackers"]
