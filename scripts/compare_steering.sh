#!/usr/bin/env bash
# Which steers further at equal divergence from the base model, weights or activations? For the traits
# named, or the four of character: three training seeds of the difference, one vector, random
# differences and vectors, on held-out questions and out of distribution, as docs/protocols/ says
# (about half an hour a trait on two cores, training aside; resumable):
# bash scripts/compare_steering.sh sycophancy hallucination
# With --quick first: one trait and seed, two levels, few questions.
# LAYER, COEFFICIENTS, QUESTIONS and SEEDS set other values; the run is exploratory then, but for a layer
# with a protocol of its own: LAYER=28 bash scripts/compare_steering.sh sycophancy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
out=results/compare quick=""
if [ "${1:-}" = --quick ]; then
    shift
    out=$out/quick quick=1
    set -- "${@:-evil}"
fi
[ $# -gt 0 ] || set -- sycophancy hallucination corrigibility evil
# Layers: by each vector's own sweep (section 7 of the lab book; formality on extract questions).
# Coefficients: about 0.1 nats a token on ordinary prompts (section 21).
declare -A layers=([evil]=19 [sycophancy]=20 [hallucination]=20 [corrigibility]=15 [formality]=13)
declare -A strengths=([evil]=2.5,-2.5 [sycophancy]=2,-2 [hallucination]=0.75,-0.75 [corrigibility]=2,-2 [formality]=0.55,-0.55)

for trait in "$@"; do
    diffs=checkpoints/seeds/$trait vector=checkpoints/vectors/$trait/${trait}_response_avg.safetensors
    options=(--coefficients "${COEFFICIENTS:-${strengths[$trait]:-1,-1}}" --max-new-tokens 60 --max-questions "${QUESTIONS:-20}")
    if [ -n "$quick" ]; then
        diffs=checkpoints/$trait/diff options=(--coefficients 0.5,1 --max-questions 3 --max-new-tokens 30)
        [ -e "$diffs/diff.json" ] || bash scripts/train_and_sweep.sh "$trait"
    else
        [ -e "$diffs/seed2/diff/diff.json" ] ||
            persona-lora train --config "train_configs/$trait.yaml" --seeds "${SEEDS:-3}" --output_dir "$diffs"
        protocol=docs/protocols/compare_$trait${LAYER:+_layer$LAYER}.yaml
        [ -n "${COEFFICIENTS:-}${QUESTIONS:-}${SEEDS:-}" ] || [ ! -e "$protocol" ] || options+=(--protocol "$protocol")
    fi
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"
    persona-lora compare --trait "$trait" --diff "$diffs" --activation-vector "$vector" \
        --layers "${LAYER:-${layers[$trait]:-19}}" --output "$out/$trait${LAYER:+_layer$LAYER}" "${options[@]}"
done
