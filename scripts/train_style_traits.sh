#!/usr/bin/env bash
# The five style directions that personas are mixed from: train a LoRA difference and extract
# steering vectors for each, unless they are there. TRAITS names others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

for trait in ${TRAITS:-self_other_focus formality intimacy narrative_mode emotional_tone}; do
    if [ ! -e "checkpoints/$trait/diff/diff.json" ]; then
        persona-lora train --config "train_configs/$trait.yaml"
    fi
    [ -e "checkpoints/vectors/$trait/${trait}_response_avg.safetensors" ] ||
        bash scripts/generate_vec.sh "$trait"
done
