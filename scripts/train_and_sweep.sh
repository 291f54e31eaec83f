#!/usr/bin/env bash
# Train one trait (unless its diff is there) and sweep it: bash scripts/train_and_sweep.sh evil
# COEFFICIENTS and QUESTIONS (how many of the forty held-out ones) make it smaller.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"
trait=${1:?name a trait, as in: bash scripts/train_and_sweep.sh evil}

persona-lora data check "$trait"
if [ ! -e "checkpoints/$trait/diff/diff.json" ]; then
    persona-lora train --config "train_configs/$trait.yaml"
fi
persona-lora sweep --trait "$trait" --diff "checkpoints/$trait/diff" \
    --coefficients "${COEFFICIENTS:--1.5,-1,-0.5,0,0.5,1,1.5}" \
    ${QUESTIONS:+--max-questions "$QUESTIONS"}
