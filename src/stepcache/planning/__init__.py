"""From calibrated runs to plans: calibration, costs, paths, replays, refinement, plan files."""
