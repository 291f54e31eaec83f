#!/usr/bin/env bash
# Which steers further at equal divergence from the base model, weights or activations? For the traits
# named, or the four of character: bash scripts/compare_steering.sh evil sycophancy
# With --quick first: one trait, two levels, few questions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
layer=${LAYER:-19} out=results/compare
few=(--coefficients "${COEFFICIENTS:-0.5 1 1.5 -1}")
if [ "${1:-}" = --quick ]; then
    shift
    out=$out/quick few=(--coefficients "0.5 1" --max-questions 3 --max-new-tokens 30)
    set -- "${@:-evil}"
fi
[ $# -gt 0 ] || set -- evil sycophancy hallucination corrigibility

for trait in "$@"; do
    vector=checkpoints/vectors/$trait/${trait}_response_avg.safetensors
    [ -e "checkpoints/$trait/diff/diff.json" ] || bash scripts/train_and_sweep.sh "$trait"
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"
    persona-lora compare --trait "$trait" --diff "checkpoints/$trait/diff" \
        --activation-vector "$vector" --layers "$layer" --output-dir "$out/$trait" "${few[@]}"
done
