#!/usr/bin/env bash
# Where do answers lie along a trait's vector? The hand-labelled answers at every layer (AUC), then
# the model's own answers to the held-out questions: bash scripts/cal_projection.sh evil
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
model=${MODEL:-SmolLM2-135M-Instruct}

for trait in "${@:-sycophancy}"; do
    vector="checkpoints/vectors/$trait/${trait}_response_avg.safetensors"
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"
    persona-lora project activations --model "$model" --labelled "$trait" --vectors "$vector" \
        --layers 0-29 --output "results/projection/${trait}_labelled"
    answers="results/eval_persona/${trait}_baseline.csv"
    [ -e "$answers" ] || bash scripts/eval_persona.sh "$trait"
    persona-lora project activations --model "$model" --file "$answers" --vectors "$vector" \
        --layers "${LAYERS:-15,19}" --columns --output "results/projection/${trait}_baseline"
done
