# A drop-in script: one file, copied where it is needed, that runs the model as before and takes one more flag.
#
#     sh examples/dropin.sh
#
# Qwen-Image's needs no clone of anything. Here it draws with a small model of the same kind; with the real one write
# --model Qwen/Qwen-Image. Wan's and HunyuanVideo-1.5's are copied into a clone of those: see their READMEs.
set -e
cd "$(dirname "$0")/.."
PROMPT="$(python -c 'import json; print(json.load(open("assets/zoo/emoji/prompts.json"))["evaluation"][0])')"
draw() {
    python Hindsight4QwenImage/hindsight_generate.py --model assets/zoo/emoji --prompt "$PROMPT" \
        --size '64*64' --device cpu --output "$@"
}
draw uncached.png
draw cached.png --budget 25
stepcache compare uncached.png cached.png --no-lpips
