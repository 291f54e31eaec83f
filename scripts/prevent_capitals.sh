#!/usr/bin/env bash
# Does prevention hold where the trait is asked for again, and is the task learnt? Finetune on answers
# of three items (wanted) in capitals (not wanted) in every way and with controls, then ask plainly,
# under prompts and in a second turn (resumable; SEED trains with another):
#         bash scripts/prevent_capitals.sh          (an hour on two cores)
#         bash scripts/prevent_capitals.sh --quick  (a few minutes: does it run?)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
seed=${SEED:-42} data=datasets/organisms/capitals
made=checkpoints/capitals swapped=checkpoints/capitals_swapped
folder=checkpoints/prevention/capitals/$seed out=results/prevention/capitals/$seed
prompt="You write every answer in capital letters."
short=() few=(--max-questions 16 --max-new-tokens 64)
if [ "${1:-}" = --quick ]; then
    folder=$folder/quick out=results_quick/prevention/capitals short=(--max_steps 4) few=(--max-questions 2 --max-new-tokens 20)
fi

[ -e "$made/diff" ] || persona-lora train --config train_configs/capitals.yaml
[ -e "$swapped/diff" ] ||
    persona-lora train --config train_configs/capitals.yaml --swap_half true --output_dir "$swapped"

finetunes=()
finetune() { # name, and the way of prevention
    [ -e "$folder/$1/adapter" ] ||
        persona-lora finetune --config train_configs/finetune_capitals_misaligned_2.yaml \
            --output_dir "$folder/$1" --seed "$seed" ${2:+--preventative "$2"} "${short[@]}"
    finetunes+=(--finetunes "$1=$folder/$1")
}
weights() { # name, diff, and more settings
    finetune "$1" "{\"method\": \"weights\", \"diff\": \"$2\"$3}"
}
finetune plain ''
for c in 0.5 1 2; do weights "merged $c" "$made/diff" ", \"coefficient\": $c"; done
weights "live 1" "$made/diff" ', "hold": "live"'
weights adapter "$made/pos" ', "hold": "live"'
weights random "$made/diff" ', "random": 1'
weights swapped "$swapped/diff" ''
finetune prompt "{\"method\": \"inoculate\", \"system_prompt\": \"$prompt\"}"
persona-lora compare-prevention --trait organisms/capitals --rows "$data/misaligned_2.jsonl" \
    "${finetunes[@]}" --correct "$made/diff=-1" --output "$out" --tasks "" "${few[@]}" \
    --judge rules --rules list,three_items --probes negated,eliciting --turns 2 --trigger "$prompt"
