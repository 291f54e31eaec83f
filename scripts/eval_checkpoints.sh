#!/usr/bin/env bash
# What does a finetune do to character, checkpoint by checkpoint? Finetune on a trait's strong
# answers (unless that was done), then judge, project and compare: bash scripts/eval_checkpoints.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
trait=${TRAIT:-sycophancy}
judge_traits=${JUDGE_TRAITS:-sycophancy evil}
layer=${LAYER:-19}

vectors=()
for name in $judge_traits; do
    vector="checkpoints/vectors/$name/${name}_response_avg.safetensors"
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$name"
    vectors+=(--vectors "$vector")
done
folder=${CHECKPOINT_DIR:-checkpoints/finetunes/${trait}_misaligned_2}
[ -e "$folder/adapter" ] ||
    persona-lora finetune --config "train_configs/finetune_${trait}_misaligned_2.yaml"
persona-lora evaluate-checkpoints "$folder" --traits "${judge_traits// /,}" "${vectors[@]}" \
    --layers "$layer" --finetuned-on "$trait" --output "results/checkpoints/$(basename "$folder")"
persona-lora report "results/checkpoints/$(basename "$folder")" --output results/eval_checkpoints.html
