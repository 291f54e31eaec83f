#!/usr/bin/env bash
# Which way of giving a model a person's voice works best? All personas (or those named), the same
# budget for every method: bash scripts/compare_methods.sh episode-000101_B episode-000117_B
# COHERENCE and RELEVANCE are what answers must keep (80 and 85 of 100; 0: voice alone counts). SEEDS=3 trains every
# difference three times and searches with each; PROTOCOL names what the run is held to.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/train_style_traits.sh
export PATH="$PWD/.venv/bin:$PATH"

personas=()
for persona in "$@"; do personas+=(--persona-id "$persona"); done
persona-lora compare-methods ${personas[@]+"${personas[@]}"} \
    --methods "${METHODS:-lora,random,prompt,svd,mean_diff,pca}" \
    --trait-vector-dir "checkpoints${SEEDS:+/seeds}" ${PROTOCOL:+--protocol "$PROTOCOL"} \
    --model "${MODEL:-SmolLM2-135M-Instruct}" --max-iterations "${ITERATIONS:-8}" \
    --population-size "${POPULATION:-8}" --num-prompts "${PROMPTS:-8}" \
    --max-new-tokens "${TOKENS:-30}" --min-coherence "${COHERENCE:-80}" \
    --min-relevance "${RELEVANCE:-85}" --output "${SAVE_DIR:-results/personas}"
