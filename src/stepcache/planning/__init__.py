"""From calibrated runs to plans: calibration, costs, paths, replays, refinement, plan files."""

from stepcache.core.follow_weights import FollowWeights
from stepcache.hindsight.method import FollowHindsight
from stepcache.planning.plan_file import FOLLOWERS

FOLLOWERS["hindsight"] = FollowHindsight
FOLLOWERS["weights"] = lambda plan, run, notes: FollowWeights(plan, notes)
