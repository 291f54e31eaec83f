#!/usr/bin/env bash
# Everything behind docs/results.md, on the packaged model (many hours on two cores; resumable: every
# step keeps what is there): bash scripts/reproduce.sh
# bash scripts/reproduce.sh 2 3    runs only what these questions need
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
questions=" ${*:-1 2 3 4 5} "
traits="evil sycophancy hallucination corrigibility"
style="formality emotional_tone"
asked() { for each in "$@"; do [[ $questions == *" $each "* ]] && return 0; done; return 1; }

# 1. The same traits as activation vectors?
if asked 1; then
    bash scripts/compare_steering.sh $traits
fi
# 3. Is weight steering faster?  5. More interpretable?
if asked 3 5; then
    bash scripts/eval_lora_steering.sh
    for trait in $traits; do bash scripts/generate_vec.sh "$trait"; done
    bash scripts/train_style_traits.sh
    others="${traits#evil } $style"
    persona-lora compare --trait evil --diff checkpoints/evil/diff --layers "${LAYER:-19}" \
        --activation-vector checkpoints/vectors/evil/evil_response_avg.safetensors --split eval \
        --coefficients "${COEFFICIENTS:-0.5,1,-1}" --max-new-tokens 60 --output results/further \
        --latency --spaces "${others// /,}"
fi
# 2. Do weight projections predict what a finetune does? And can it be prevented?
if asked 2; then
    bash scripts/predict_finetuning.sh
    TASKS="choice" bash scripts/train_with_prevention.sh evil
fi
# 4. Can several persona LoRAs be combined?
if asked 4; then
    COHERENCE=60 RELEVANCE=0 METHODS="lora,random,equal,prompt,svd,mean_diff,pca" ITERATIONS=6 PROMPTS=6 bash scripts/compare_methods.sh
fi
persona-lora report $(ls -d results/compare/*/seed*/ results/further/ 2>/dev/null) --output results/reproduced.html
persona-lora research-questions
