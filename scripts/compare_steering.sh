#!/usr/bin/env bash
# Which steers further at equal divergence from the base model, weights or activations? For the traits
# named, or the four of character, each vector at the layer that its own sweep chose (or LAYER):
# bash scripts/compare_steering.sh evil sycophancy
# With --quick first: one trait, two levels, few questions, layer 19.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
out=results/compare
few=(--coefficients "${COEFFICIENTS:-0.5,1,-1}" --max-new-tokens 60)
if [ "${1:-}" = --quick ]; then
    shift
    LAYER=${LAYER:-19} out=$out/quick few=(--coefficients 0.5,1 --max-questions 3 --max-new-tokens 30)
    set -- "${@:-evil}"
fi
[ $# -gt 0 ] || set -- evil sycophancy hallucination corrigibility

for trait in "$@"; do
    vector=checkpoints/vectors/$trait/${trait}_response_avg.safetensors
    [ -e "checkpoints/$trait/diff/diff.json" ] || bash scripts/train_and_sweep.sh "$trait"
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"
    grid=results/layers/$trait/grid.json
    [ -n "${LAYER:-}" ] || [ -e "$grid" ] || bash scripts/eval_steering_sweep.sh "$trait"
    layer=${LAYER:-$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["best_layer"])' "$grid")}
    persona-lora compare --trait "$trait" --diff "checkpoints/$trait/diff" \
        --activation-vector "$vector" --layers "$layer" --output "$out/$trait" "${few[@]}"
done
