"""Rollouts: evaluation, expert demonstrations, recording and video."""
