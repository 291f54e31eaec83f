#!/usr/bin/env bash
# The size of the house: lines and modules, room by room, and every function that has outgrown itself.
# bash scripts/house.sh [lines of a function] [parameters of a function]; exit 1 where one is larger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" - "${1:-60}" "${2:-8}" <<'PY'
import ast
import sys
from collections import Counter
from pathlib import Path

most_lines, most_parameters = map(int, sys.argv[1:])
lines, modules, large = Counter(), Counter(), []
for path in sorted(Path("persona_lora").rglob("*.py")):
    text = path.read_text()
    room = path.parts[1] if len(path.parts) > 2 else "(top)"
    lines[room] += text.count("\n")
    modules[room] += 1
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            parameters = len([each for each in given if each.arg not in ("self", "cls")])
            length = node.end_lineno - node.lineno + 1
            if length > most_lines or parameters > most_parameters:
                large.append(f"{path}:{node.lineno} {node.name}: {length} lines, {parameters} parameters")
print(f"{'room':12} {'modules':>7} {'lines':>7}")
for room in sorted(lines):
    print(f"{room:12} {modules[room]:7} {lines[room]:7}")
print(f"{'all':12} {modules.total():7} {lines.total():7}")
print(f"{len(large)} functions over {most_lines} lines or {most_parameters} parameters", *large, sep="\n  ")
sys.exit(bool(large))
PY
