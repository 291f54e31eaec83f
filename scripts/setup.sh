#!/usr/bin/env bash
# Set up .venv with everything the project needs, in the versions of requirements.lock. Quick when
# nothing has changed. PYTHON names another interpreter, TORCH another build or version of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=${TORCH:-torch==2.13.0}

stamp=.venv/.setup
wanted=$(cat pyproject.toml requirements.lock scripts/setup.sh - <<<"$torch" | sha256sum | cut -d' ' -f1)
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

# The lock is whole, so that nothing else is looked for; torch follows, whose builds differ.
pip --no-deps --require-hashes --requirement requirements.lock
pip "$torch"
pip --no-deps --no-build-isolation --editable .
echo "$wanted" >"$stamp"
