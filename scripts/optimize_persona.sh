#!/usr/bin/env bash
# The mix of style directions that speaks like a person: train the directions (unless they are
# there), then search: bash scripts/optimize_persona.sh episode-000101_B
# METHOD is lora, svd, mean_diff or pca; ITERATIONS, POPULATION and PROMPTS set the budget, COHERENCE and
# RELEVANCE what answers must keep (80 and 85 of 100; 0: voice alone counts).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/train_style_traits.sh
export PATH="$PWD/.venv/bin:$PATH"

for persona in "${@:-episode-000101_B}"; do
    persona-lora optimize --persona-id "$persona" --method "${METHOD:-lora}" \
        --model "${MODEL:-SmolLM2-135M-Instruct}" --max-iterations "${ITERATIONS:-30}" \
        --population-size "${POPULATION:-10}" --num-prompts "${PROMPTS:-10}" \
        --min-coherence "${COHERENCE:-80}" --min-relevance "${RELEVANCE:-85}" \
        --output "${SAVE_DIR:-optimization_results}"
done
