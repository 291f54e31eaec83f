#!/usr/bin/env bash
# Do projections predict what finetuning does to character? Finetune on eleven families of rows: three
# traits and anxious plain and at two levels, capitals and six more traits plain and shown, with two seeds;
# three of them also with half the steps, rank 4 or a quarter of the learning rate. Judge every finetune,
# project it, take off what the plain rows of its family do with the same settings, and correlate:
# bash scripts/predict_finetuning.sh            (two to three hours on two cores; resumable)
# bash scripts/predict_finetuning.sh --quick    (six short finetunes, few questions: does it run?)
# It is held to docs/protocols/predict_finetuning_controls.yaml; with MODEL, TRAITS, LAYER, QUESTIONS or SEEDS
# of your own to PROTOCOL, or else exploratory. FINETUNE_ONLY=1 stops before anything is judged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
traits=${TRAITS:-sycophancy hallucination evil}
layer=${LAYER:-19} model=${MODEL:-SmolLM2-135M-Instruct} made=${MADE:-checkpoints/seeds}
out=${OUT:-results/prediction} folder=$made/prediction
files="" seeds=${SEEDS:-11 23} varied=""
for trait in $traits anxious; do files+=" $trait/normal $trait/misaligned_1 $trait/misaligned_2"; done
for trait in $traits; do varied+=" $trait/normal $trait/misaligned_2"; done
files+=" organisms/capitals/normal organisms/capitals/misaligned_2"
others="corrigibility emotional_tone formality intimacy narrative_mode self_other_focus"
for trait in $others; do files+=" $trait/normal $trait/misaligned_2"; done
short=() few=(--max-questions "${QUESTIONS:-20}" --control-rows normal)
protocol=${PROTOCOL:-}
[ -n "${MODEL:-}${TRAITS:-}${LAYER:-}${QUESTIONS:-}${SEEDS:-}${protocol}" ] ||
    protocol=docs/protocols/predict_finetuning_controls.yaml
[ -z "$protocol" ] || few+=(--protocol "$protocol")
if [ "${1:-}" = --quick ]; then
    traits=${TRAITS:-evil} others="" seeds=42 varied="" out=results_quick/prediction folder=$folder/quick
    files=""
    for trait in $traits anxious; do files+=" $trait/normal $trait/misaligned_1 $trait/misaligned_2"; done
    short=(--max_steps 4) few=(--max-questions 3 --max-new-tokens 30 --control-rows normal)
fi

# The other traits have pairs: the first sixty, shown on one side and plain on the other.
for trait in $others; do
    python - "$trait" "$folder/rows/$trait" <<'ROWS'
import json, pathlib, sys
trait, folder = sys.argv[1], pathlib.Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
pairs = [json.loads(line) for line in open(f"datasets/{trait}/train.jsonl")][:60]
for name, side in (("normal", "negative"), ("misaligned_2", "positive")):
    rows = [{"messages": pair["prompt"] + pair[side]} for pair in pairs]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(lines))
ROWS
done

finetunes=()
finetune() { # FILE NAME OPTIONS…
    local rows=datasets/$1.jsonl tuned=$folder/$2
    [ -e "$rows" ] || rows=$folder/rows/$1.jsonl
    finetunes+=(--finetunes "$tuned")
    [ -e "$tuned/adapter" ] || persona-lora finetune --config train_configs/finetune_sycophancy_misaligned_2.yaml \
        --model_name_or_path "$model" --train_file "$rows" --output_dir "$tuned" --save_steps 1000 "${@:3}" "${short[@]}"
}
for seed in $seeds; do
    for file in $files; do finetune "$file" "${file//\//_}_seed$seed" --seed "$seed"; done
done
for file in $varied; do
    finetune "$file" "${file//\//_}_half" --seed 3 --max_steps 15
    finetune "$file" "${file//\//_}_rank4" --seed 3 --lora_r 4 --lora_alpha 8
    finetune "$file" "${file//\//_}_slow" --seed 3 --learning_rate 5e-5
done
[ -z "${FINETUNE_ONLY:-}" ] || exit 0

diffs=() vectors=()
for trait in $traits; do
    diff=$made/$trait/seed1/diff vector=$made/vectors/$trait/${trait}_response_avg.safetensors
    if [ -n "${short[*]}" ]; then
        diff=checkpoints/ready/$trait/diff
        [ -e "$diff/diff.json" ] || persona-lora gallery get --traits "$trait"
    fi
    [ -e "$diff/diff.json" ] || persona-lora train --config "train_configs/$trait.yaml" \
        --model_name_or_path "$model" --seed 43 --output_dir "$made/$trait/seed1"
    [ -e "$vector" ] || persona-lora extract --model "$model" --trait "$trait" --source answers \
        --methods mean_diff,svd,pca --output "$made/vectors/$trait"
    diffs+=(--diffs "$diff") vectors+=(--vectors "$vector")
done
persona-lora predict-finetuning --model "$model" "${finetunes[@]}" --traits "${traits// /,}" \
    "${diffs[@]}" "${vectors[@]}" --layers "$layer" --output "$out" "${few[@]}"
