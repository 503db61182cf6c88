"""Seconds of the phases of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter


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
