#!/usr/bin/env bash
# Everything behind docs/results.md, on the packaged model (many hours on two cores; resumable: every
# step keeps what is there), into results, with its tables in results/answers.md: bash scripts/reproduce.sh
# bash scripts/reproduce.sh 2 3        only what these questions need
# bash scripts/reproduce.sh --quick    all of it in minutes, with ready diffs and few questions, into
#                                      results_quick: does it run? Its numbers mean nothing, but for
#                                      times (--quick 3: of the ready diff; 3 alone: of a rank of 32).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
results=results quick=()
if [ "${1:-}" = --quick ]; then
    results=results_quick quick=(--quick)
    shift
    for trait in evil sycophancy self_other_focus formality intimacy narrative_mode emotional_tone; do
        [ -e "checkpoints/ready/$trait/diff/diff.json" ] || persona-lora gallery get --traits "$trait"
    done
fi
questions=" ${*:-1 2 3 4 5} "
asked() { for each in "$@"; do [[ $questions == *" $each "* ]] && return 0; done; return 1; }
others=sycophancy,hallucination,corrigibility,self_other_focus,formality,intimacy,narrative_mode,emotional_tone
# What each part does, and about how long it takes on two cores: all of it | --quick.
plan="1:weights or activations, three traits, three training seeds:2.5 hours:2 minutes
2:seventy finetunes and their projections; screening by 36 finetunes; prevention of two traits, three training seeds:10 hours:40 minutes
3:speed, with 5 (nine traits, three training seeds):2 hours:5 minutes
4:persona searches over twelve personas, three training seeds:2 hours:3 minutes
5:geometry of weights and activations, with 3:::"
while IFS=: read -r part what long short; do
    asked "$part" || continue
    [ -z "${quick[*]}" ] || long=$short
    echo "question $part: $what${long:+, about $long}"
done <<<"$plan"

# 1. The same traits as activation vectors?
if asked 1; then
    if [ -n "${quick[*]}" ]; then
        bash scripts/compare_steering.sh --quick
    else
        bash scripts/compare_steering.sh sycophancy hallucination formality
        LAYER=28 PROTOCOL=docs/protocols/compare_sycophancy_layer28.yaml bash scripts/compare_steering.sh sycophancy
    fi
fi
# 3. Is weight steering faster?  5. More interpretable?
if asked 3 5; then
    made=checkpoints/seeds diff=evil/seed0/diff few=(--coefficients "${COEFFICIENTS:-0.5,1,-1}" --max-new-tokens 60)
    if [ -n "${quick[*]}" ]; then
        others=sycophancy made=checkpoints/ready diff=evil/diff few=(--coefficients 0.5 --max-new-tokens 20 --max-questions 3)
    else
        TRAITS="evil ${others//,/ }" SEEDS=3 bash scripts/train_style_traits.sh
    fi
    for trait in evil ${others//,/ }; do
        [ -e "$made/vectors/$trait/${trait}_response_avg.safetensors" ] || persona-lora extract --trait "$trait" \
            --source answers --methods mean_diff,svd,pca --output "$made/vectors/$trait"
    done
    persona-lora compare --trait evil --diff "$made/$diff" --layers "${LAYER:-19}" \
        --activation-vector "$made/vectors/evil/evil_response_avg.safetensors" --split eval --trait-vector-dir "$made" \
        --output "$results/further" --latency --spaces "$others" "${few[@]}"
fi
# 2. Do weight projections predict what a finetune does? And can it be prevented?
if asked 2; then
    bash scripts/predict_finetuning.sh "${quick[@]}"
    bash scripts/screen_by_finetuning.sh "${quick[@]}"
    if [ -n "${quick[*]}" ]; then
        bash scripts/train_with_prevention.sh capitals --quick
        bash scripts/prevent_two_traits.sh --quick
    else
        PROTOCOL=docs/protocols/prevent_capitals.yaml bash scripts/train_with_prevention.sh capitals
        ARMS="plain live1 random prompt" CORRECT=-1 QUESTIONS=24 TURNS=1 PROTOCOL=docs/protocols/prevent_sycophancy.yaml \
            bash scripts/train_with_prevention.sh sycophancy
        PROTOCOL=docs/protocols/prevent_two_traits bash scripts/prevent_two_traits.sh
    fi
fi
# 4. Can several persona LoRAs be combined?
if asked 4; then
    if [ -n "${quick[*]}" ]; then
        persona-lora compare-methods --persona-id episode-000101_B --trait-vector-dir checkpoints/ready \
            --methods lora,random,equal,prompt --max-iterations 2 --population-size 4 --num-prompts 3 \
            --max-new-tokens 20 --output "$results/personas"
    else
        SEEDS=3 PROTOCOL=docs/protocols/compare_methods.yaml METHODS=lora,random,equal,prompt ITERATIONS=6 PROMPTS=6 \
            bash scripts/compare_methods.sh episode-000{101,117,142,158,173,196}_{A,B}
    fi
fi
runs=$results/compare/*/seed*/
[ -z "${quick[*]}" ] || runs=$results/compare/*/
compared=$(ls -d $runs $results/further/ 2>/dev/null || true)
[ -z "$compared" ] || persona-lora report $compared --output $results/reproduced.html
persona-lora research-questions --results $results --output $results/answers.md --overwrite
