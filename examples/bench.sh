# Every method side by side on a model, and the report.
#
#     sh examples/bench.sh
#
# With your own model: MODEL=DIR PROMPTS=prompts.txt. Interrupt at any time; run it again with RESUME=--resume to continue.
set -e
cd "$(dirname "$0")/.."
MODEL="${MODEL:-assets/zoo/patterns}"
PROMPTS="${PROMPTS:-assets/prompts/patterns.txt}"
OUT="${OUT:-$(mktemp -d)/results}"
stepcache bench --model "$MODEL" --prompts "$PROMPTS" --out "$OUT" $RESUME \
    --policies "hindsight:25 uniform:25 steps:25 fbcache:0.1"
stepcache report "$OUT"
