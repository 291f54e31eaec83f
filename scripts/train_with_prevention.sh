#!/usr/bin/env bash
# Does steering during a finetune keep it from picking up a trait, does the trait stay away where it is
# asked for again, and what does that cost? Finetune on the trait's strong answers plainly, with every way
# of prevention and with controls, each with several training seeds of the finetune and of the
# difference; then ask plainly, under prompts and in a second turn, and measure the loss on the rows:
#         bash scripts/train_with_prevention.sh sycophancy          (two hours on two cores; resumable)
#         bash scripts/train_with_prevention.sh capitals            (answers of three items, wanted, in capitals, not wanted)
#         bash scripts/train_with_prevention.sh evil --quick        (a few minutes: does it run?)
# ARMS, SEEDS, MODEL, LAYER, QUESTIONS, TURNS, TASKS (choice,steps,perplexity: capability) and OUT name others,
# CORRECT="-0.5 -1" takes the difference off the plain finetune afterwards; with PROTOCOL the run is held to
# one. FINETUNE_ONLY=1 stops before anything is asked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
name=sycophancy
[[ ${1:---quick} == --* ]] || { name=$1 && shift; }
seeds=${SEEDS:-3} model=${MODEL:-SmolLM2-135M-Instruct} layer=${LAYER:-19} tokens=60
# also merged2, merged-1, live0.5 …, adapter, activations2, ablate
arms=${ARMS:-plain merged0.5 merged1 live1 activations prompt swapped random}
out=${OUT:-prevention/$name} trait=$name asked=\"trait\":\ \"$name\" judged=()
if [ "$name" = capitals ]; then
    prompt="You write every answer in capital letters."
    trait=organisms/capitals tokens=64 asked="\"system_prompt\": \"$prompt\"" # these tokens are the protocol's
    judged=(--judge rules --rules list,three_items --trigger "$prompt")
fi
rows=datasets/$trait/misaligned_2.jsonl
made=checkpoints/$out/made folder=checkpoints/$out/finetunes out=results/$out
short=() few=(--max-new-tokens "$tokens" --turns "${TURNS:-2}" ${QUESTIONS:+--max-questions "$QUESTIONS"})
if [ "${1:-}" = --quick ]; then
    made=$made/quick folder=$folder/quick out=results_quick/${out#results/} seeds=1 arms="plain live1 prompt"
    short=(--max_steps 1 --per_device_train_batch_size 1) few=(--max-questions 2 --max-new-tokens 20 --turns 2)
fi
model=(--model "$model") vector=$made/vectors/${name}_response_avg.safetensors

train() { # folder, and more settings
    [ -e "$1/seed$((seeds - 1))/diff" ] || persona-lora train --config "train_configs/$name.yaml" "${model[@]}" \
        --output_dir "$@" --seeds "$seeds" "${short[@]}"
}
train "$made/diffs"
[[ $arms != *swapped* ]] || train "$made/swapped" --swap_half true
[[ $arms != *a[cb]* ]] || [ -e "$vector" ] || persona-lora extract --trait "$trait" "${model[@]}" \
    --source answers --positions response_avg --output "$made/vectors"

finetunes=() corrections=()
for arm in $arms; do
    for ((k = 0; k < seeds; k++)); do # a finetune has another seed than the difference that steers it
        diff="\"method\": \"weights\", \"diff\": \"$made/diffs/seed$k"
        at="\"vector\": \"$vector\", \"layers\": [$layer]" strength=${arm#activations}
        case $arm in
            plain) way="" ;;
            merged*) way="{$diff/diff\", \"coefficient\": ${arm#merged}}" ;;
            live*) way="{$diff/diff\", \"coefficient\": ${arm#live}, \"hold\": \"live\"}" ;;
            adapter) way="{$diff/pos\", \"hold\": \"live\"}" ;;
            random) way="{$diff/diff\", \"hold\": \"live\", \"random\": $k}" ;;
            swapped) way="{${diff/diffs/swapped}/diff\", \"hold\": \"live\"}" ;;
            activations*) way="{\"method\": \"activations\", $at${strength:+, \"coefficient\": $strength}}" ;;
            ablate) way="{\"method\": \"ablate\", $at}" ;;
            prompt) way="{\"method\": \"inoculate\", $asked}" ;;
            *) echo "error: no arm $arm" >&2 && exit 2 ;;
        esac
        [ -e "$folder/$arm/seed$k/adapter" ] || persona-lora finetune "${model[@]}" \
            --config "train_configs/finetune_${name}_misaligned_2.yaml" --output_dir "$folder/$arm/seed$k" \
            --save_steps 1000 --seed $((11 + k)) ${way:+--preventative "$way"} "${short[@]}"
    done
    finetunes+=(--finetunes "$arm=$folder/$arm")
done
[ -z "${FINETUNE_ONLY:-}" ] || exit 0
for coefficient in ${CORRECT:-}; do corrections+=(--correct "$made/diffs=$coefficient"); done
persona-lora compare-prevention --trait "$trait" --rows "$rows" "${model[@]}" "${finetunes[@]}" "${corrections[@]}" \
    --output "$out" --tasks "${TASKS:-}" "${few[@]}" ${PROTOCOL:+--protocol "$PROTOCOL"} \
    "${judged[@]}" --probes negated,eliciting
