#!/usr/bin/env bash
# Which steers further at equal divergence from the base model, weights or activations? For the traits
# named, or the four of character: three training seeds of the difference, one vector, random
# differences and vectors, on held-out questions and out of distribution, as docs/protocols/ says
# (about half an hour a trait on two cores, training aside; resumable):
# bash scripts/compare_steering.sh sycophancy hallucination
# With --quick first: one trait and its ready diff, one level, few questions, a vector of eight pairs.
# MODEL, LAYER, COEFFICIENTS, QUESTIONS, SPLIT, CONTROLS and SEEDS set other values; the run is exploratory then,
# unless PROTOCOL names what it is held to:
# LAYER=28 PROTOCOL=docs/protocols/compare_sycophancy_layer28.yaml bash scripts/compare_steering.sh sycophancy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
out=results/compare quick=""
if [ "${1:-}" = --quick ]; then
    shift
    out=results_quick/compare quick=1
    set -- "${@:-evil}"
fi
[ $# -gt 0 ] || set -- sycophancy hallucination corrigibility evil
# Layers: by each vector's own sweep (section 7 of the lab book; formality on extract questions).
# Coefficients: about 0.1 nats a token on ordinary prompts (section 21).
declare -A layers=([evil]=19 [sycophancy]=20 [hallucination]=20 [corrigibility]=15 [formality]=13)
declare -A strengths=([evil]=2.5,-2.5 [sycophancy]=2,-2 [hallucination]=0.75,-0.75 [corrigibility]=2,-2 [formality]=0.55,-0.55)

model=${MODEL:-SmolLM2-135M-Instruct} checkpoints=checkpoints
if [ -n "${MODEL:-}" ]; then
    : "${LAYER:?the layers here are those of the packaged model; give one}"
    checkpoints=checkpoints/$(basename "$MODEL" .gguf) out=$out/$(basename "$MODEL" .gguf)
fi
for trait in "$@"; do
    diffs=$checkpoints/seeds/$trait vectors=$checkpoints/vectors/$trait protocol=${PROTOCOL:-} name=$trait
    vector=$vectors/${trait}_response_avg.safetensors
    options=(--coefficients "${COEFFICIENTS:-${strengths[$trait]:-1,-1}}" --max-new-tokens 60
        --max-questions "${QUESTIONS:-20}" --random-controls "${CONTROLS:-3}" ${SPLIT:+--split "$SPLIT"})
    if [ -n "$quick" ]; then
        bash scripts/quick_vectors.sh "$trait"
        diffs=checkpoints/ready/$trait/diff vector=checkpoints/quick/vectors/$trait/${trait}_response_avg.safetensors
        options=(--coefficients 0.5 --max-questions 2 --max-new-tokens 20 --random-controls 1 --split "${SPLIT:-eval}")
    else
        [ -e "$diffs/seed$((${SEEDS:-3} - 1))/diff/diff.json" ] || persona-lora train --config "train_configs/$trait.yaml" \
            --model "$model" --seeds "${SEEDS:-3}" --output_dir "$diffs"
        if [ -n "$protocol" ]; then
            name=$(basename "${protocol#*compare_}" .yaml)
        elif [ -e "docs/protocols/compare_$trait.yaml" ] &&
            [ -z "${MODEL:-}${LAYER:-}${COEFFICIENTS:-}${QUESTIONS:-}${SPLIT:-}${CONTROLS:-}${SEEDS:-}" ]; then
            protocol=docs/protocols/compare_$trait.yaml
        fi
        [ -z "$protocol" ] || options+=(--protocol "$protocol")
    fi
    [ -e "$vector" ] || persona-lora extract --model "$model" --trait "$trait" --source answers \
        --methods mean_diff,svd,pca --output "$vectors"
    persona-lora compare --model "$model" --trait "$trait" --diff "$diffs" --activation-vector "$vector" \
        --layers "${LAYER:-${layers[$trait]:-19}}" --output "$out/$name" "${options[@]}"
done
