"""Readers and writers of the file formats that trajectories come in."""
