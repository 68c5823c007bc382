# Calibrate a model, plan a budget with a few schedules tried, and follow the plan.
#
#     sh examples/plan.sh
#
# With your own model: MODEL=DIR PROMPTS=prompts.txt, eight prompts of the kind you will run, and --refine 16.
set -e
cd "$(dirname "$0")/.."
MODEL="${MODEL:-assets/zoo/patterns}"
PROMPTS="${PROMPTS:-assets/prompts/patterns.txt}"
OUT="$(mktemp -d)"
stepcache calibrate --model "$MODEL" --prompts "$PROMPTS" --out "$OUT/calibration.json"
stepcache show "$OUT/calibration.json"                                     # expected error of every budget
stepcache plan --calibration "$OUT/calibration.json" --budget 20 --refine 1 --model "$MODEL" --out "$OUT/plan.json"
PROMPT="$(grep -v '^#' "$PROMPTS" | tail -n 1)"
stepcache generate --model "$MODEL" --prompt "$PROMPT" --plan "$OUT/plan.json" --output "$OUT/planned.mp4"
echo "everything is in $OUT"
