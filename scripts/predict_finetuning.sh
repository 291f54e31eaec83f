#!/usr/bin/env bash
# Do projections predict what finetuning does to character? Finetune on plain, mild and strong
# answers of several traits, judge every finetune on every trait, project, correlate:
# bash scripts/predict_finetuning.sh            (an hour or two on two cores; resumable)
# bash scripts/predict_finetuning.sh --quick    (four short finetunes, few questions: does it run?)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
traits=${TRAITS:-evil sycophancy hallucination}
layer=${LAYER:-19}
out=results/prediction folder=checkpoints/prediction
levels="normal misaligned_1 misaligned_2"
short=() few=()
if [ "${1:-}" = --quick ]; then
    traits=${TRAITS:-evil} levels="normal misaligned_2" out=$out/quick folder=$folder/quick
    short=(--max_steps 4) few=(--max-questions 3 --max-new-tokens 30)
fi

diffs=() vectors=()
for trait in $traits; do
    [ -e "checkpoints/$trait/diff/diff.json" ] || bash scripts/train_and_sweep.sh "$trait"
    vector=checkpoints/vectors/$trait/${trait}_response_avg.safetensors
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"
    diffs+=(--diffs "checkpoints/$trait/diff") vectors+=(--vectors "$vector")
done
finetunes=()
for trait in $traits anxious; do
    for level in $levels; do
        tuned=$folder/${trait}_$level
        [ -e "$tuned/adapter" ] || persona-lora finetune \
            --config train_configs/finetune_sycophancy_misaligned_2.yaml \
            --train_file "datasets/$trait/$level.jsonl" --output_dir "$tuned" --save_steps 1000 "${short[@]}"
        finetunes+=(--finetunes "$tuned")
    done
done
persona-lora predict-finetuning "${finetunes[@]}" --traits "${traits// /,}" \
    "${diffs[@]}" "${vectors[@]}" --layers "$layer" --output "$out" "${few[@]}"
