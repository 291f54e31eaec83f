#!/usr/bin/env bash
# Make gallery/ anew: train all nine traits on one frozen A of rank 8, put them into eight bits, and
# calibrate what came out of that. Run again, it goes on where it was. An hour on two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

traits=(sycophancy evil hallucination corrigibility formality intimacy emotional_tone narrative_mode self_other_focus)
made=checkpoints/family
trained=() ready=()
for trait in "${traits[@]}"; do
    [ -e "$made/$trait/diff/diff.json" ] ||
        persona-lora train --config "train_configs/$trait.yaml" --lora_r 8 --lora_alpha 16 \
            --family "$made/base.safetensors" --output_dir "$made/$trait"
    trained+=("$made/$trait/diff") ready+=("$made/ready/$trait/diff")
done
[ -e "$made/packed" ] ||
    persona-lora gallery make --diffs "$(IFS=,; echo "${trained[*]}")" --output "$made/packed"
[ -e "$made/ready" ] || persona-lora gallery get --from "$made/packed" --output "$made/ready"
for diff in "${ready[@]}"; do
    [ -e "$diff.strength.json" ] || persona-lora calibrate --diff "$diff"
done
persona-lora gallery make --diffs "$(IFS=,; echo "${ready[*]}")" --output gallery --overwrite
