#!/usr/bin/env bash
# How well does a vector steer at one layer, beside prompts and a random direction? On the held-out
# questions, at the layer that the grid chose: bash scripts/eval_steering.sh evil
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
model=${MODEL:-SmolLM2-135M-Instruct}

runs=()
for trait in "${@:-sycophancy}"; do
    grid="results/layers/$trait/grid.json"
    [ -e "$grid" ] || bash scripts/eval_steering_sweep.sh "$trait"
    layer=${LAYER:-$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["best_layer"])' "$grid")}
    persona-lora sweep --model "$model" --trait "$trait" --layers "$layer" \
        --vector "checkpoints/vectors/$trait/${trait}_response_avg.safetensors" \
        --coefficients "${COEFFICIENTS:--2,-1,0,1,2,3}" --max-new-tokens 60 --output "results/steering/$trait"
    runs+=("results/layers/$trait" "results/steering/$trait")
done
persona-lora report "${runs[@]}" --output results/eval_steering.html
