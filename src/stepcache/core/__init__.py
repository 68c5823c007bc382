"""Trajectory, plan, cache and summary: what every method and host shares."""
