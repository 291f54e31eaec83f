#!/usr/bin/env bash
# Does data screening rank rows by what finetuning on them does? Of 120 rows of three traits, strong and
# ordinary ones, draw subsets, finetune on each, measure what it did, and correlate that over subsets with
# what every way of screening says of their rows (see benchmarks/screening.py):
#         bash scripts/screen_by_finetuning.sh          (an hour and a half on two cores; resumable)
#         bash scripts/screen_by_finetuning.sh --quick  (a few minutes: does it run?)
# SUBSETS, QUESTIONS, LAYER and OUT name others; JUDGED the traits whose answers are judged (JUDGED= for none), FINETUNE_ONLY=1
# stops before anything is measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
traits="sycophancy hallucination evil"
subsets=${SUBSETS:-36} out=${OUT:-results/screening} judged=${JUDGED-sycophancy}
folder=checkpoints/${out#results/}
short=() few=(--max-questions "${QUESTIONS:-24}" --max-new-tokens 60) own=() pool=()
if [ "${1:-}" = --quick ]; then
    subsets=4 out=results_quick/screening folder=checkpoints/screening/quick
    bash scripts/quick_vectors.sh $traits
    mkdir -p "$folder" && ln -sfn ../../quick/vectors "$folder/vectors"
    short=(--max_steps 1 --per_device_train_batch_size 1) few=(--max-questions 2 --max-new-tokens 20) own=(--texts 2) pool=(--rows 4)
fi
python benchmarks/screening.py draw "$folder" --subsets "$subsets" "${pool[@]}"
for trait in $traits; do
    [ -e "checkpoints/ready/$trait/diff/diff.json" ] || persona-lora gallery get --traits "$trait"
    [ -e "$folder/vectors/$trait/${trait}_response_avg.safetensors" ] || persona-lora extract --trait "$trait" \
        --source answers --positions response_avg --output "$folder/vectors/$trait"
done
finetunes=()
for ((k = 0; k < subsets; k++)); do # every subset with a training seed of its own
    [ -e "$folder/subset$k/adapter" ] || persona-lora finetune --train_file "$folder/rows/subset$k.jsonl" \
        --config train_configs/finetune_sycophancy_misaligned_2.yaml --num_train_epochs 2 --save_steps 1000 \
        --output_dir "$folder/subset$k" --seed "$k" "${short[@]}"
    finetunes+=(--finetunes "$folder/subset$k")
done
[ -z "${FINETUNE_ONLY:-}" ] || exit 0
diffs=() vectors=()
for trait in $traits; do
    vector=$folder/vectors/$trait/${trait}_response_avg.safetensors
    diffs+=(--diffs "checkpoints/ready/$trait/diff")
    [[ ,$judged, != *,$trait,* ]] || vectors+=(--vectors "$vector")
    [ -e "$folder/screened/$trait.csv" ] || persona-lora data screen --file "$folder/rows/pool.jsonl" \
        --vector "$vector" --layers "${LAYER:-19}" --threshold 0 --output "$folder/screened/$trait.csv"
    [ -e "$folder/screened/judged_$trait.csv" ] || persona-lora judge score --trait "$trait" \
        --file "$folder/rows/answers.jsonl" --output "$folder/screened/judged_$trait.csv"
done
[ -e "$folder/screened/pulls.csv" ] || persona-lora data screen --file "$folder/rows/pool.jsonl" "${diffs[@]}" \
    --dtype float32 --output "$folder/screened/pulls.csv"
if [ -n "$judged" ]; then
    persona-lora predict-finetuning "${finetunes[@]}" --traits "$judged" "${vectors[@]}" \
        --layers "${LAYER:-19}" --output "$out/judged" "${few[@]}"
    own+=(--judged "$out/judged")
fi
python benchmarks/screening.py read "$folder" "${own[@]}"
