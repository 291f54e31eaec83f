#!/usr/bin/env bash
# Does steering during a finetune keep it from picking up a trait? Finetune on the trait's strong
# answers plainly and with each way of prevention (METHODS names some), then judge all on held-out
# questions: bash scripts/train_with_prevention.sh evil
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
trait=${1:-evil}
layer=${LAYER:-19}
diff=checkpoints/$trait/diff
vector=checkpoints/vectors/$trait/${trait}_response_avg.safetensors
config=train_configs/finetune_${trait}_misaligned_2.yaml
folder=checkpoints/finetunes/${trait}_misaligned_2
out=results/prevention/$trait

[ -e "$diff/diff.json" ] || bash scripts/train_and_sweep.sh "$trait"
[ -e "$vector" ] || bash scripts/generate_vec.sh "$trait"

declare -A prevention=(
    [plain]=''
    [weights_added]="{\"method\": \"weights\", \"diff\": \"$diff\", \"coefficient\": ${WEIGHTS:-1.0}}"
    [weights_subtracted]="{\"method\": \"weights\", \"diff\": \"$diff\", \"coefficient\": -${WEIGHTS:-1.0}}"
    [activations_added]="{\"method\": \"activations\", \"vector\": \"$vector\", \"layers\": [$layer], \"coefficient\": ${ACTIVATIONS:-2.0}}"
    [activations_subtracted]="{\"method\": \"activations\", \"vector\": \"$vector\", \"layers\": [$layer], \"coefficient\": -${ACTIVATIONS:-2.0}}"
    [ablated]="{\"method\": \"ablate\", \"vector\": \"$vector\", \"layers\": [$layer]}"
    [inoculated]="{\"method\": \"inoculate\", \"trait\": \"$trait\"}"
)
runs=()
for name in plain ${METHODS:-weights_added weights_subtracted activations_added activations_subtracted ablated inoculated}; do
    tuned=$folder/prevention/$name
    [ "$name" = plain ] && tuned=$folder
    [ -e "$tuned/adapter" ] || persona-lora finetune --config "$config" --output_dir "$tuned" \
        --drift_diffs "$diff" --drift_every 4 \
        ${prevention[$name]:+--preventative "${prevention[$name]}"}
    persona-lora evaluate --trait "$trait" --adapter "$tuned/adapter" --max-new-tokens 60 \
        --output "$out/$name.csv"
    [ "$name" = plain ] || runs+=("$out/$name")
done
# The model before finetuning, and the correction at inference time: the diff taken off the plain
# finetune, on top of its adapter.
persona-lora evaluate --trait "$trait" --max-new-tokens 60 --output "$out/base.csv"
persona-lora evaluate --trait "$trait" --adapter "$folder/adapter" --diff "$diff" \
    --coefficient "-${WEIGHTS:-1.0}" --max-new-tokens 60 --output "$out/corrected.csv"
persona-lora paired "$out/plain" "$out/base" "${runs[@]}" "$out/corrected" --output "$out/paired.csv"
