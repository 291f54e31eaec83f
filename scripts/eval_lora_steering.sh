#!/usr/bin/env bash
# Experiment 1: does the trait move with the coefficient? All four traits, one report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
traits=${TRAITS:-evil sycophancy hallucination corrigibility}

runs=()
for trait in $traits; do
    bash scripts/train_and_sweep.sh "$trait"
    runs+=("results/sweep/$trait")
done
.venv/bin/persona-lora report "${runs[@]}" --output results/eval_lora_steering.html
