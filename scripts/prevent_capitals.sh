#!/usr/bin/env bash
# Does prevention hold where the trait is asked for again, and is the task learnt? Finetune on answers
# of three items (wanted) in capitals (not wanted) in every way and with controls, each with several
# training seeds of the finetune and of the difference, then ask plainly, under prompts and in a second
# turn (resumable; ARMS, SEEDS, MODEL, LAYER, QUESTIONS, TURNS and OUT name others, CORRECT=-1
# takes the difference off the plain finetune afterwards; with PROTOCOL the run is held to one):
#         bash scripts/prevent_capitals.sh          (an hour and a half on two cores)
#         bash scripts/prevent_capitals.sh --quick  (a few minutes: does it run?)
# FINETUNE_ONLY=1 stops before anything is asked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
seeds=${SEEDS:-3} model=${MODEL:-SmolLM2-135M-Instruct} layer=${LAYER:-19} data=datasets/organisms/capitals
arms=${ARMS:-plain merged0.5 merged1 live1 activations prompt swapped random} # also merged2, live0.5 …, adapter, ablate
out=${OUT:-prevention/capitals}
made=checkpoints/$out/made folder=checkpoints/$out/finetunes out=results/$out
prompt="You write every answer in capital letters."
short=() few=(--max-new-tokens 64 --turns "${TURNS:-2}" ${QUESTIONS:+--max-questions "$QUESTIONS"})
if [ "${1:-}" = --quick ]; then
    made=$made/quick folder=$folder/quick out=results_quick/prevention/capitals seeds=1 arms="plain live1 prompt"
    short=(--max_steps 4) few=(--max-questions 2 --max-new-tokens 20 --turns 2)
fi
model=(--model "$model") vector=$made/vectors/capitals_response_avg.safetensors

train() { # folder, and more settings
    [ -e "$1/seed$((seeds - 1))/diff" ] || persona-lora train --config train_configs/capitals.yaml "${model[@]}" \
        --output_dir "$@" --seeds "$seeds" "${short[@]}"
}
train "$made/diffs"
[[ $arms != *swapped* ]] || train "$made/swapped" --swap_half true
[[ $arms != *a[cb]* ]] || [ -e "$vector" ] || persona-lora extract --trait organisms/capitals "${model[@]}" \
    --source answers --positions response_avg --output "$made/vectors"

finetunes=()
for arm in $arms; do
    for ((k = 0; k < seeds; k++)); do # a finetune has another seed than the difference that steers it
        diff="\"method\": \"weights\", \"diff\": \"$made/diffs/seed$k"
        case $arm in
            plain) way="" ;;
            merged*) way="{$diff/diff\", \"coefficient\": ${arm#merged}}" ;;
            live*) way="{$diff/diff\", \"coefficient\": ${arm#live}, \"hold\": \"live\"}" ;;
            adapter) way="{$diff/pos\", \"hold\": \"live\"}" ;;
            random) way="{$diff/diff\", \"hold\": \"live\", \"random\": $k}" ;;
            swapped) way="{${diff/diffs/swapped}/diff\", \"hold\": \"live\"}" ;;
            activations) way="{\"method\": \"activations\", \"vector\": \"$vector\", \"layers\": [$layer]}" ;;
            ablate) way="{\"method\": \"ablate\", \"vector\": \"$vector\", \"layers\": [$layer]}" ;;
            prompt) way="{\"method\": \"inoculate\", \"system_prompt\": \"$prompt\"}" ;;
            *) echo "error: no arm $arm" >&2 && exit 2 ;;
        esac
        [ -e "$folder/$arm/seed$k/adapter" ] || persona-lora finetune "${model[@]}" \
            --config train_configs/finetune_capitals_misaligned_2.yaml --output_dir "$folder/$arm/seed$k" \
            --seed $((11 + k)) ${way:+--preventative "$way"} "${short[@]}"
    done
    finetunes+=(--finetunes "$arm=$folder/$arm")
done
[ -z "${FINETUNE_ONLY:-}" ] || exit 0
persona-lora compare-prevention --trait organisms/capitals --rows "$data/misaligned_2.jsonl" "${model[@]}" \
    "${finetunes[@]}" ${CORRECT:+--correct "$made/diffs=$CORRECT"} --output "$out" --tasks "" "${few[@]}" ${PROTOCOL:+--protocol "$PROTOCOL"} \
    --judge rules --rules list,three_items --probes negated,eliciting --trigger "$prompt"
