#!/usr/bin/env bash
# Where does the model stand without any steering? bash scripts/eval_persona.sh evil sycophancy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
model=${MODEL:-SmolLM2-135M-Instruct}

for trait in "${@:-sycophancy}"; do
    persona-lora evaluate --method none --model "$model" --trait "$trait" \
        --output "results/eval_persona/${trait}_baseline.csv"
done
