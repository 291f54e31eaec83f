#!/usr/bin/env bash
# Do projections predict what finetuning does to character? Finetune on eleven families of rows: three
# traits and anxious plain and at two levels, capitals and six more traits plain and shown, with two seeds;
# three of them also with half the steps, rank 4 or a quarter of the learning rate. Judge every finetune,
# project it, take off what the plain rows of its family do with the same settings, and correlate:
# bash scripts/predict_finetuning.sh            (two to three hours on two cores; resumable)
# bash scripts/predict_finetuning.sh --quick    (six short finetunes, few questions: does it run? Also after --doses)
# bash scripts/predict_finetuning.sh --doses    (36 finetunes of nine families, each strong and weak, judged on two
#                                                traits of which the reader is fit on a larger model too)
# It is held to docs/protocols/predict_finetuning_controls.yaml; --doses, or with MODEL, TRAITS, LAYER, QUESTIONS
# or SEEDS of your own, to PROTOCOL, or else exploratory. FINETUNE_ONLY=1 stops before anything is judged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
traits=${TRAITS:-sycophancy hallucination evil}
judged=${JUDGED:-} made=${MADE:-checkpoints/seeds} out=${OUT:-results/prediction}
[[ "$*" =~ ^(--doses)?\ ?(--quick)?$ ]] || { echo "error: $*: pass --quick, --doses, --doses --quick or nothing" >&2 && exit 2; }
case ${1:-} in
    --doses) # its differences are trained for fewer steps
        traits=${TRAITS:-narrative_mode intimacy formality hallucination}
        judged=${JUDGED:-narrative_mode intimacy}
        made=${MADE:-checkpoints/doses} out=${OUT:-results/prediction_doses} ;;
esac
quick="" kind=${1:-}
[[ " $* " != *" --quick "* ]] || quick=1
layer=${LAYER:-19} model=${MODEL:-SmolLM2-135M-Instruct} folder=$made/prediction
files="" seeds=${SEEDS:-11 23} varied=""
for trait in $traits anxious; do files+=" $trait/normal $trait/misaligned_1 $trait/misaligned_2"; done
for trait in $traits; do varied+=" $trait/normal $trait/misaligned_2"; done
files+=" organisms/capitals/normal organisms/capitals/misaligned_2"
others="corrigibility emotional_tone formality intimacy narrative_mode self_other_focus"
for trait in $others; do files+=" $trait/normal $trait/misaligned_2"; done
short=() brief=() few=(--max-questions "${QUESTIONS:-20}" --control-rows normal)
protocol=${PROTOCOL:-}
[ -n "${MODEL:-}${TRAITS:-}${LAYER:-}${QUESTIONS:-}${SEEDS:-}${protocol}${1:-}" ] ||
    protocol=docs/protocols/predict_finetuning_controls.yaml
[ -z "$protocol" ] || few+=(--protocol "$protocol")
if [ "$kind" = --doses ]; then
    seeds="" varied="" files="" brief=(--max_steps 20) few[1]=${QUESTIONS:-12}
    others="formality intimacy narrative_mode self_other_focus"
    for family in sycophancy hallucination evil anxious organisms/capitals $others; do
        files+=" $family/normal $family/misaligned_2"
    done
fi
if [ -n "$quick" ]; then # two families, ready diffs, vectors of eight pairs
    traits=${TRAITS:-evil} judged=${JUDGED:-${TRAITS:-evil}} others="" varied="" files=""
    out=results_quick/${out#results/} folder=$folder/quick short=(--max_steps 1 --per_device_train_batch_size 1)
    few=(--max-questions 2 --max-new-tokens 20 --control-rows normal)
    for trait in $traits anxious; do files+=" $trait/normal $trait/misaligned_2"; done
    if [ "$kind" != --doses ]; then
        seeds=42
        for trait in $traits anxious; do files+=" $trait/misaligned_1"; done
    fi
fi

# The other traits have pairs: the first sixty, shown on one side and plain on the other. The rest is for
# differences and vectors that are to have seen no row of a finetune.
for trait in $others; do
    python - "$trait" "$folder/rows/$trait" "$folder/rest/$trait" <<'ROWS'
import json, pathlib, shutil, sys
trait, folder, rest = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
folder.mkdir(parents=True, exist_ok=True)
lines = open(f"datasets/{trait}/train.jsonl").read().splitlines(keepends=True)
for name, side in (("normal", "negative"), ("misaligned_2", "positive")):
    pairs = map(json.loads, lines[:60])
    rows = [{"messages": pair["prompt"] + pair[side]} for pair in pairs]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)
shutil.copytree(f"datasets/{trait}", rest, dirs_exist_ok=True)
(rest / "train.jsonl").write_text("".join(lines[60:]))
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
if [ "$kind" = --doses ]; then
    for file in $files; do
        finetune "$file" "${file//\//_}_strong" --seed 11 --max_steps 24 --per_device_train_batch_size 4
        finetune "$file" "${file//\//_}_weak" --seed 23 --max_steps 12 --per_device_train_batch_size 4 \
            --lora_r 4 --lora_alpha 8
    done
fi
for file in $varied; do
    finetune "$file" "${file//\//_}_half" --seed 3 --max_steps 15
    finetune "$file" "${file//\//_}_rank4" --seed 3 --lora_r 4 --lora_alpha 8
    finetune "$file" "${file//\//_}_slow" --seed 3 --learning_rate 5e-5
done
[ -z "${FINETUNE_ONLY:-}" ] || exit 0

judged=${judged:-$traits} diffs=() vectors=()
for trait in $traits; do
    pairs=$trait
    [ "$kind" != --doses ] || [ ! -e "$folder/rest/$trait" ] || pairs=$folder/rest/$trait
    diff=$made/$trait/seed1/diff vector=$made/vectors/$trait/${trait}_response_avg.safetensors
    if [ -n "$quick" ]; then
        bash scripts/quick_vectors.sh "$trait"
        diff=checkpoints/ready/$trait/diff vector=checkpoints/quick/vectors/$trait/${trait}_response_avg.safetensors
    fi
    [ -e "$diff/diff.json" ] || persona-lora train --config "train_configs/$trait.yaml" --trait "$pairs" \
        --model_name_or_path "$model" --seed 43 --output_dir "$made/$trait/seed1" "${brief[@]}"
    [ -e "$vector" ] || persona-lora extract --model "$model" --trait "$pairs" --source answers \
        --methods mean_diff,svd,pca --output "$made/vectors/$trait"
    diffs+=(--diffs "$diff") vectors+=(--vectors "$vector")
done
persona-lora predict-finetuning --model "$model" "${finetunes[@]}" --traits "${judged// /,}" \
    "${diffs[@]}" "${vectors[@]}" --layers "$layer" --output "$out" "${few[@]}"
