#!/usr/bin/env bash
# Can two traits be kept away at once? Finetune on answers that are lists (wanted), in capitals and in
# French (not wanted): plainly, with the difference of either trait held in the weights, with both, and
# with a random one of the spectrum of both; then ask, and let rules tell all three.
#         bash scripts/prevent_two_traits.sh            (an hour and a half on two slow cores; resumable)
#         bash scripts/prevent_two_traits.sh --quick    (minutes: does it run?)
# SEEDS, MODEL, QUESTIONS, COEFFICIENT and OUT name others; with PROTOCOL both runs are held to one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
seeds=${SEEDS:-3} model=(--model "${MODEL:-SmolLM2-135M-Instruct}") strength=${COEFFICIENT:-0.5}
out=${OUT:-prevention/two_traits} short=() few=(--max-questions "${QUESTIONS:-24}" --max-new-tokens 64)
arms=(plain capitals french both random)
made=checkpoints/$out/made folder=checkpoints/$out/finetunes out=results/$out
if [ "${1:-}" = --quick ]; then
    made=$made/quick folder=$folder/quick out=results_quick/prevention/two_traits seeds=1 arms=(plain both random)
    short=(--max_steps 1 --per_device_train_batch_size 1) few=(--max-questions 2 --max-new-tokens 20)
fi
last=seed$((seeds - 1))

for trait in capitals french; do
    [ -e "$made/$trait/$last/diff" ] || persona-lora train --config "train_configs/$trait.yaml" "${model[@]}" \
        --output_dir "$made/$trait" --seeds "$seeds" "${short[@]}"
done
for ((k = 0; k < seeds; k++)); do # a finetune has another seed than the differences that steer it
    capitals=$made/capitals/seed$k/diff=$strength french=$made/french/seed$k/diff=$strength
    for arm in "${arms[@]}"; do
        held=$made/held/$arm/seed$k control=""
        case $arm in
            plain) mix="" ;;
            capitals) mix=$capitals ;;
            french) mix=$french ;;
            both) mix=$capitals,$french ;;
            random) mix="" held=$made/held/both/seed$k control=", \"random\": $k" ;;
        esac
        [ -z "$mix" ] || [ -e "$held" ] || persona-lora export --mix "$mix" --output "$held"
        way="{\"method\": \"weights\", \"diff\": \"$held\"$control}"
        [ "$arm" != plain ] || way=""
        [ -e "$folder/$arm/seed$k/adapter" ] || persona-lora finetune "${model[@]}" \
            --config train_configs/finetune_capitals_and_french.yaml --output_dir "$folder/$arm/seed$k" \
            --save_steps 1000 --seed $((11 + k)) ${way:+--preventative "$way"} "${short[@]}"
    done
done
finetunes=()
for arm in "${arms[@]}"; do finetunes+=(--finetunes "$arm=$folder/$arm"); done
for trait in capitals french; do # asked plainly, and where that trait is asked for
    others=$([ "$trait" = capitals ] && echo french || echo capitals)
    persona-lora compare-prevention --trait "organisms/$trait" "${model[@]}" "${finetunes[@]}" --tasks "" \
        --rows datasets/organisms/french/capitals_and_french.jsonl --output "$out/$trait" "${few[@]}" \
        --judge rules --rules "$others,list" --probes eliciting \
        ${PROTOCOL:+--protocol "${PROTOCOL}_$trait.yaml"}
done
