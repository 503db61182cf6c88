"""Residual reinforcement learning on a frozen policy: small networks learn what to add to the actions it proposes."""
