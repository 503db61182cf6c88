"""One dictionary of metrics, in every place it is looked at."""

from eva_rl.tracking.sinks import TRACKERS
from eva_rl.tracking.tracker import Resume, Tracker, check_trackers

__all__ = ["TRACKERS", "Resume", "Tracker", "check_trackers"]
