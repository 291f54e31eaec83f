#!/usr/bin/env bash
# Everything behind docs/results.md, on the packaged model (many hours on two cores; resumable: every
# step keeps what is there), into results, with its tables in results/answers.md: bash scripts/reproduce.sh
# bash scripts/reproduce.sh 2 3        only these parts: 1 to 5 are the questions, and 1b to 5b
#                                      ask them of the second model (into results and results_second)
# SECOND_MODEL=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf  where its makers' file lies; without it 1b to 5b are left out
# bash scripts/reproduce.sh --quick    all of it in minutes, with ready diffs, vectors of eight pairs and few
#                                      questions, into results_quick (delete one of another version): does it run? The
#                                      packaged model stands for the second. ROUNDS=5 BATCHES=1,8,32 with
#                                      --quick 3: times as in full, of the ready diff (3 alone: of a rank of 32).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
all="1 1b 2 2b 3 3b 4 4b 5 5b"
results=results quick=() second=${SECOND_MODEL:-} made=checkpoints/second few=(--max-new-tokens 20 --max-questions 3)
short=() timed=(--latency)
others=sycophancy,hallucination,corrigibility,self_other_focus,formality,intimacy,narrative_mode,emotional_tone
beside=corrigibility,emotional_tone,formality,hallucination,sycophancy
if [ "${1:-}" = --quick ]; then
    shift
    results=results_quick quick=(--quick) second=SmolLM2-135M-Instruct made=$made/quick short=(--max_steps 1 --per_device_train_batch_size 1)
    few=(--max-new-tokens 20 --max-questions 2) timed+=(--batches "${BATCHES:-1,8}" --rounds "${ROUNDS:-2}")
    others=sycophancy beside=sycophancy
elif [ -n "$second" ] && [ ! -e "$second" ]; then
    echo "error: SECOND_MODEL=$second: there is no such file; name Qwen2.5-Coder-0.5B-Instruct's GGUF file" >&2 && exit 2
fi
for part in "$@"; do
    [[ " $all " == *" $part "* ]] || { echo "error: no part $part; there are $all" >&2 && exit 2; }
done
parts=" ${*:-$all} "
asked() { for each in "$@"; do [[ $parts == *" $each "* ]] && return 0; done; return 1; }
begins() { [ -n "$second" ] && asked "$@"; }                    # of the second model
held() { [ -n "${quick[*]}" ] || echo "docs/protocols/$1"; }   # to which protocol, in full
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
# What each part does, and about how long it takes on two cores: all of it | --quick.
plan="1:weights or activations, three traits, three training seeds:2.5 hours:a minute
1b:the second model, sycophancy, three training seeds:1.5 hours:a minute
2:seventy finetunes and their projections; screening by 36 finetunes; prevention of two traits, three training seeds:10 hours:5 minutes, beside the others
2b:the second model, 36 finetunes at two doses; prevention of capitals:6 hours:3 minutes
3:speed, with 5 (nine traits, three training seeds):2 hours:a minute
3b:the second model, speed:half an hour:a minute
4:persona searches over twelve personas, three training seeds:2 hours:a minute
4b:the second model, persona searches over twelve personas:4 hours:a minute
5:geometry of weights and activations, with 3:::
5b:the second model, geometry of six traits:2 hours:a minute"
while IFS=: read -r part what long brief; do
    asked "$part" || continue
    [ -z "${quick[*]}" ] || long=$brief
    [[ $part != *b || -n $second ]] || long="" what+=": left out; give SECOND_MODEL=FILE.gguf (docs/results.md says which)"
    echo "part $part: $what${long:+, about $long}"
done <<<"$plan"
if [ -z "$second" ] && ! asked 1 2 3 4 5; then echo "error: nothing is left to do without SECOND_MODEL=FILE.gguf" >&2 && exit 2; fi
if [ -n "${quick[*]}" ] && asked 2 3 3b 5 5b; then bash scripts/quick_vectors.sh evil sycophancy hallucination; fi

# 2. Do weight projections predict what a finetune does? And can it be prevented?
question_2() {
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
}
lane=""
if asked 2 && [ -n "${quick[*]}" ]; then # beside all others, which take about as long
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    mkdir -p $results
    question_2 >$results/part_2.log 2>&1 &
    lane=$!
    trap 'kill $lane 2>/dev/null || true' EXIT
elif asked 2; then
    question_2
fi
# 1. The same traits as activation vectors?
if asked 1; then
    if [ -n "${quick[*]}" ]; then
        bash scripts/compare_steering.sh --quick
    else
        bash scripts/compare_steering.sh sycophancy hallucination formality
        LAYER=28 PROTOCOL=docs/protocols/compare_sycophancy_layer28.yaml bash scripts/compare_steering.sh sycophancy
    fi
fi
if begins 1b; then
    MODEL=$second LAYER=14 COEFFICIENTS=1.2,-1.2 SPLIT=eval CONTROLS=1 PROTOCOL=$(held compare_sycophancy_0.5b.yaml) \
        bash scripts/compare_steering.sh "${quick[@]}" sycophancy
fi
# 3. Is weight steering faster?  5. More interpretable?
if asked 3 5; then
    from=checkpoints/seeds diff=evil/seed0/diff steered=(--coefficients "${COEFFICIENTS:-0.5,1,-1}" --max-new-tokens 60)
    if [ -n "${quick[*]}" ]; then
        from=checkpoints/quick diff=evil/diff steered=(--coefficients 0.5 "${few[@]}")
    else
        TRAITS="evil ${others//,/ }" SEEDS=3 bash scripts/train_style_traits.sh
    fi
    for trait in evil ${others//,/ }; do
        [ -e "$from/vectors/$trait/${trait}_response_avg.safetensors" ] || persona-lora extract --trait "$trait" \
            --source answers --methods mean_diff,svd,pca --output "$from/vectors/$trait"
    done
    persona-lora compare --trait evil --diff "$from/$diff" --layers "${LAYER:-19}" \
        --activation-vector "$from/vectors/evil/evil_response_avg.safetensors" --split eval --trait-vector-dir "$from" \
        --output "$results/further" "${timed[@]}" --spaces "$others" "${steered[@]}"
fi
if begins 3b 5b; then
    traits=sycophancy
    ! asked 5b || traits="evil ${beside//,/ }"
    vector() { echo "$made/vectors/$1/$1_response_avg.safetensors"; }
    for trait in $traits; do
        [ -z "${quick[*]}" ] || [ -e "$made/vectors" ] || { mkdir -p "$made" && ln -sfn ../../quick/vectors "$made/vectors"; }
        [ -e "$made/$trait/diff/diff.json" ] || python train_lora.py --config "train_configs/$trait.yaml" \
            --model_name_or_path "$second" --output_dir "$made/$trait" "${short[@]}"
        [ -e "$(vector "$trait")" ] || persona-lora extract --trait "$trait" --source answers --model "$second" \
            --output "$made/vectors/$trait"
    done
    ! asked 3b || persona-lora compare --trait sycophancy --diff "$made/sycophancy/diff" --layers 14 \
        --activation-vector "$(vector sycophancy)" --split eval --model "$second" --output "${results}_second/latency" \
        "${timed[@]}" --coefficients 1 --random-controls 1 "${few[@]}"
    ! asked 5b || persona-lora compare --trait evil --diff "$made/evil/diff" --layers 14 \
        --activation-vector "$(vector evil)" --split eval --model "$second" --output "${results}_second/spaces" \
        --coefficients 0.83 --trait-vector-dir "$made" --spaces "$beside" "${few[@]}"
fi
if begins 2b; then
    MODEL=$second LAYER=14 PROTOCOL=$(held predict_finetuning_doses_0.5b.yaml) \
        bash scripts/predict_finetuning.sh --doses "${quick[@]}"
    QUESTIONS=16 TURNS=1 MODEL=$second LAYER=14 ARMS="plain live1 random prompt" OUT=prevention/capitals_0.5b \
        PROTOCOL=$(held prevent_capitals_0.5b.yaml) bash scripts/train_with_prevention.sh capitals "${quick[@]}"
fi
# 4. Can several persona LoRAs be combined?
if asked 4; then
    if [ -n "${quick[*]}" ]; then
        persona-lora gallery get --traits self_other_focus,formality,intimacy,narrative_mode,emotional_tone
        persona-lora compare-methods --persona-id episode-000101_B --trait-vector-dir checkpoints/ready \
            --methods lora,random,equal,prompt --max-iterations 1 --population-size 4 --num-prompts 2 \
            --max-new-tokens 20 --output "$results/personas"
    else
        SEEDS=3 PROTOCOL=docs/protocols/compare_methods.yaml METHODS=lora,random,equal,prompt ITERATIONS=6 PROMPTS=6 \
            bash scripts/compare_methods.sh episode-000{101,117,142,158,173,196}_{A,B}
    fi
fi
if begins 4b; then
    persons=(episode-000{101,117,142,158,173,196}_{A,B}) budget=(6 8 6)
    [ -z "${quick[*]}" ] || persons=("${persons[0]}") budget=(1 4 2)
    for trait in self_other_focus formality intimacy narrative_mode emotional_tone; do
        [ -e "$made/style/$trait/diff/diff.json" ] || python train_lora.py --config "train_configs/$trait.yaml" \
            --model_name_or_path "$second" --output_dir "$made/style/$trait" "${short[@]:---max_steps=24}"
    done
    protocol=$(held compare_methods_0.5b.yaml)
    persona-lora compare-methods $(printf -- '--persona-id %s ' "${persons[@]}") --methods lora,random,equal,prompt \
        --trait-vector-dir "$made/style" ${protocol:+--protocol "$protocol"} --model "$second" --max-iterations "${budget[0]}" \
        --population-size "${budget[1]}" --num-prompts "${budget[2]}" --max-new-tokens 30 --min-coherence 80 \
        --min-relevance 85 --output "${results}_second/personas"
fi
[ -z "$lane" ] || wait "$lane" || { tail -n 20 $results/part_2.log >&2 && exit 1; }
asked 1 2 3 4 5 || exit 0
compared=$(for run in $results/compare/*/{,seed*/} $results/further/; do [ ! -e "$run/splits.jsonl" ] || echo "$run"; done)
[ -z "$compared" ] || persona-lora report $compared --output $results/reproduced.html
persona-lora research-questions --results $results --output $results/answers.md --overwrite
