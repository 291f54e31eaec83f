#!/usr/bin/env bash
# The five style directions that personas are mixed from: train a LoRA difference and extract
# steering vectors for each, unless they are there. TRAITS names others; SEEDS=3 trains each three times, into
# checkpoints/seeds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

at=checkpoints each=diff seeds=()
if [ -n "${SEEDS:-}" ]; then
    at=checkpoints/seeds each=seed$((SEEDS - 1))/diff seeds=(--seeds "$SEEDS")
    mkdir -p "$at" && ln -sfn ../vectors "$at/vectors"
fi
for trait in ${TRAITS:-self_other_focus formality intimacy narrative_mode emotional_tone}; do
    [ -e "$at/$trait/$each/diff.json" ] ||
        persona-lora train --config "train_configs/$trait.yaml" --output_dir "$at/$trait" "${seeds[@]}"
    [ -e "checkpoints/vectors/$trait/${trait}_response_avg.safetensors" ] ||
        bash scripts/generate_vec.sh "$trait"
done
