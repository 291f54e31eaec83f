#!/usr/bin/env bash
# Does steering during a finetune keep it from picking up a trait, and what does that cost? Finetune
# on the trait's strong answers plainly and with each way of prevention at several strengths, then
# compare trait, coherence, task loss and capability (resumable; METHODS, WEIGHTS, ACTIVATIONS,
# TASKS name some): bash scripts/train_with_prevention.sh evil          (an hour or two on two cores)
#         bash scripts/train_with_prevention.sh evil --quick  (a few minutes: does it run?)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
trait=${1:-evil}
layer=${LAYER:-19}
methods=${METHODS:-weights activations ablate inoculate} strengths=${CORRECTIONS:-0.5 1}
tasks=${TASKS:-choice,steps,perplexity}
weights=${WEIGHTS:-"-1 1 2"} activations=${ACTIVATIONS:-"-2 2 4"}
diff=checkpoints/$trait/diff
vector=checkpoints/vectors/$trait/${trait}_response_avg.safetensors
config=train_configs/finetune_${trait}_misaligned_2.yaml
folder=checkpoints/prevention/$trait out=results/prevention/$trait
short=() few=()
if [ "${2:-}" = --quick ]; then
    folder=$folder/quick out=results_quick/prevention/$trait diff=checkpoints/ready/$trait/diff weights=1 activations=2 strengths=${CORRECTIONS:-1}
    methods=${METHODS:-weights activations} tasks=${TASKS:-choice,perplexity}
    short=(--max_steps 4) few=(--max-questions 3 --limit 8 --max-new-tokens 20)
fi

[ "${2:-}" != --quick ] || [ -e "$diff/diff.json" ] || persona-lora gallery get --traits "$trait"
[ -e "$diff/diff.json" ] || bash scripts/train_and_sweep.sh "$trait"
[ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"

finetunes=()
finetune() { # name, and how training is steered (nothing for the plain finetune)
    [ -e "$folder/$1/adapter" ] || persona-lora finetune --config "$config" \
        --output_dir "$folder/$1" --save_steps 1000 --drift_diffs "$diff" --drift_every 4 \
        ${2:+--preventative "$2"} "${short[@]}"
    finetunes+=(--finetunes "$1=$folder/$1")
}
finetune plain ''
for method in $methods; do
    case $method in
        weights) for c in $weights; do
            finetune "weights$c" "{\"method\": \"weights\", \"diff\": \"$diff\", \"coefficient\": $c}"
        done ;;
        activations) for c in $activations; do
            finetune "activations$c" "{\"method\": \"activations\", \"vector\": \"$vector\", \"layers\": [$layer], \"coefficient\": $c}"
        done ;;
        ablate) finetune ablated "{\"method\": \"ablate\", \"vector\": \"$vector\", \"layers\": [$layer]}" ;;
        inoculate) finetune inoculated "{\"method\": \"inoculate\", \"trait\": \"$trait\"}" ;;
    esac
done
corrections=()
for c in $strengths; do corrections+=(--correct "$diff=-$c"); done
persona-lora compare-prevention --trait "$trait" --rows "datasets/$trait/misaligned_2.jsonl" \
    "${finetunes[@]}" "${corrections[@]}" --output "$out" \
    --tasks "$tasks" "${few[@]}"
