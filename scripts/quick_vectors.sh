#!/usr/bin/env bash
# For --quick: vectors of the packaged model from eight pairs of each trait named, beside links to the
# ready diffs, in checkpoints/quick. Their numbers mean nothing: bash scripts/quick_vectors.sh evil sycophancy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
at=checkpoints/quick missing=()
for trait in "$@"; do [ -e "checkpoints/ready/$trait/diff/diff.json" ] || missing+=("$trait"); done
[ -z "${missing[*]}" ] || persona-lora gallery get --traits "$(IFS=, && echo "${missing[*]}")"
for trait in "$@"; do
    mkdir -p "$at/pairs/$trait"
    ln -sfn "../ready/$trait" "$at/$trait"
    [ -e "$at/vectors/$trait/${trait}_response_avg.safetensors" ] && continue
    cp -r "datasets/$trait/." "$at/pairs/$trait"
    head -n 8 "datasets/$trait/train.jsonl" >"$at/pairs/$trait/train.jsonl"
    persona-lora extract --trait "$at/pairs/$trait" --source answers --methods mean_diff,svd,pca \
        --output "$at/vectors/$trait"
done
