#!/usr/bin/env bash
# Does it matter how a vector was elicited? One finetune, projected on variants of one trait's vector
# (another elicitation, other methods): bash scripts/eval_projection_variants.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
trait=${TRAIT:-anxious}
layer=${LAYER:-19}

for variant in ${VARIANTS:-anxious anxious_2}; do
    [ -e "checkpoints/vectors/${variant}/${variant}_response_avg.safetensors" ] ||
        bash scripts/generate_vec.sh "$variant"
done
folder=checkpoints/finetunes/${trait}_misaligned_2
[ -e "$folder/adapter" ] ||
    persona-lora finetune --config "train_configs/finetune_${trait}_misaligned_2.yaml"
vectors=()
for vector in checkpoints/vectors/"$trait"*/*_response_avg*.safetensors; do
    vectors+=(--vectors "$vector")
done
persona-lora evaluate-checkpoints "$folder" --traits "$trait" "${vectors[@]}" --layers "$layer" \
    --finetuned-on "$trait" --output "results/checkpoints/${trait}_variants"
persona-lora report "results/checkpoints/${trait}_variants" --output results/eval_projection_variants.html
