#!/usr/bin/env bash
# Does inspect_ai, asking `persona-lora serve`, get the answers of the merged model? It wants an older
# fsspec than the lock has, so it goes into an environment of its own on top of .venv (about 200 MB),
# in the user's cache or in $INSPECT_VENV: bash scripts/test_inspect_ai.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export INSPECT_VENV="${INSPECT_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/persona_lora/inspect-ai-0.3.285}"
if [ ! -e "$INSPECT_VENV/ready" ]; then
    .venv/bin/python -m venv "$INSPECT_VENV"
    site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    echo "import site; site.addsitedir('$(site .venv)')" >"$(site "$INSPECT_VENV")/persona_lora.pth"
    "$INSPECT_VENV/bin/python" -m pip install --quiet --disable-pip-version-check inspect_ai==0.3.285
    touch "$INSPECT_VENV/ready"
fi
"$INSPECT_VENV/bin/python" -m pytest -n 0 tests/serving/test_server.py -k inspect_ai "$@"
