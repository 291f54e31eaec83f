#!/usr/bin/env bash
# Do projections predict what finetuning does to character? Finetune on fourteen files of answers
# (three traits and anxious at three levels, capitals at two), with two seeds, and on four of them with
# half the steps, rank 4 or a quarter of the learning rate; judge every finetune, project, correlate:
# bash scripts/predict_finetuning.sh            (about two hours on two cores; resumable)
# bash scripts/predict_finetuning.sh --quick    (four short finetunes, few questions: does it run?)
# It is held to docs/protocols/predict_finetuning.yaml; with TRAITS, LAYER, QUESTIONS or SEEDS of your own it
# is exploratory. FINETUNE_ONLY=1 stops before anything is judged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
traits=${TRAITS:-sycophancy hallucination evil}
layer=${LAYER:-19}
out=results/prediction folder=checkpoints/prediction
files="" seeds=${SEEDS:-42 7} varied=""
for trait in $traits anxious; do files+=" $trait/normal $trait/misaligned_1 $trait/misaligned_2"; done
for trait in $traits; do varied+=" $trait/misaligned_2"; done
files+=" organisms/capitals/normal organisms/capitals/misaligned_2" varied+=" ${traits%% *}/normal"
short=() few=(--max-questions "${QUESTIONS:-12}")
[ -n "${TRAITS:-}${LAYER:-}${QUESTIONS:-}${SEEDS:-}" ] || few+=(--protocol docs/protocols/predict_finetuning.yaml)
if [ "${1:-}" = --quick ]; then
    traits=${TRAITS:-evil} seeds=42 varied="" out=results_quick/prediction folder=$folder/quick
    files="$traits/normal $traits/misaligned_2 anxious/normal anxious/misaligned_2"
    short=(--max_steps 4) few=(--max-questions 3 --max-new-tokens 30)
fi

finetunes=()
finetune() { # NAME FILE OPTIONS…
    local tuned=$folder/$1 file=$2
    finetunes+=(--finetunes "$tuned")
    [ -e "$tuned/adapter" ] || persona-lora finetune --config train_configs/finetune_sycophancy_misaligned_2.yaml \
        --train_file "datasets/$file.jsonl" --output_dir "$tuned" --save_steps 1000 "${@:3}" "${short[@]}"
}
for seed in $seeds; do
    for file in $files; do finetune "${file//\//_}_seed$seed" "$file" --seed "$seed"; done
done
for file in $varied; do
    finetune "${file//\//_}_half" "$file" --seed 3 --max_steps 15
    finetune "${file//\//_}_rank4" "$file" --seed 3 --lora_r 4 --lora_alpha 8
    finetune "${file//\//_}_slow" "$file" --seed 3 --learning_rate 5e-5
done
[ -z "${FINETUNE_ONLY:-}" ] || exit 0

diffs=() vectors=()
for trait in $traits; do
    diff=checkpoints/seeds/$trait/seed0/diff
    if [ -n "${short[*]}" ]; then
        diff=checkpoints/ready/$trait/diff
        [ -e "$diff/diff.json" ] || persona-lora gallery get --traits "$trait"
    fi
    [ -e "$diff/diff.json" ] ||
        persona-lora train --config "train_configs/$trait.yaml" --output_dir "checkpoints/seeds/$trait/seed0"
    vector=checkpoints/vectors/$trait/${trait}_response_avg.safetensors
    [ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"
    diffs+=(--diffs "$diff") vectors+=(--vectors "$vector")
done
persona-lora predict-finetuning "${finetunes[@]}" --traits "${traits// /,}" \
    "${diffs[@]}" "${vectors[@]}" --layers "$layer" --output "$out" "${few[@]}"
