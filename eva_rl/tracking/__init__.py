"""One dictionary of metrics, in every place it is looked at."""

from eva_rl.tracking.tracker import Tracker

__all__ = ["Tracker"]
