#!/usr/bin/env bash
# Extract a trait's steering vectors: bash scripts/generate_vec.sh evil anxious_2
# SOURCE=prompts asks the model under system prompts, judges and filters, as the published pipeline
# does; the default, answers, takes the trait's own training pairs: a small model follows system
# prompts too weakly. A variant has no pairs of its own, so it is asked under its prompts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
model=${MODEL:-SmolLM2-135M-Instruct}

for trait in "${@:-sycophancy}"; do
    if [ "${SOURCE:-answers}" = answers ] && [ -e "datasets/$trait/train.jsonl" ]; then
        persona-lora extract --model "$model" --trait "$trait" --source answers \
            --methods mean_diff,svd,pca
    else
        persona-lora extract --model "$model" --trait "$trait" --source prompts \
            --samples "${SAMPLES:-1}" --temperature "${TEMPERATURE:-0}" --max-new-tokens 60 \
            --positive-threshold "${POSITIVE:-50}" --negative-threshold "${NEGATIVE:-50}"
    fi
done
