#!/usr/bin/env bash
# Which layer steers best? The grid of layers and coefficients, asked on the extract questions, so
# that the choice does not use up the held-out ones: bash scripts/eval_steering_sweep.sh evil
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
model=${MODEL:-SmolLM2-135M-Instruct}

for trait in "${@:-sycophancy}"; do
    vector="checkpoints/vectors/$trait/${trait}_response_avg.safetensors"
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"
    persona-lora sweep --model "$model" --trait "$trait" --vector "$vector" --split extract \
        --layers "${LAYERS:-10-25:5}" --coefficients "${COEFFICIENTS:--2,2,3}" \
        --max-questions "${QUESTIONS:-10}" --max-new-tokens 60 --no-references \
        --output "results/layers/$trait"
done
