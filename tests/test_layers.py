"""The layering rule of docs/architecture.md, as two tables and a little ``ast``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "persona_lora"

# What each layer may import of ours, besides itself.
MAY_IMPORT = {
    "core": set(),
    "models": {"core"},
    "judges": {"core"},
    "analysis": {"core"},
    "steering": {"core", "models", "judges", "analysis"},
    "projections": {"core", "models", "judges", "analysis"},
    "profiles": {"core", "models", "judges", "analysis"},
    "training": {
        "core", "models", "judges", "analysis", "steering", "projections", "profiles",
    },
    "experiments": {
        "core", "models", "judges", "analysis", "steering", "projections", "profiles", "training",
    },
    "cli": {
        "core", "models", "judges", "analysis", "steering", "projections", "profiles", "training",
        "experiments",
    },
}  # fmt: skip

# Where a third party may be imported: layers, or single modules.
FENCES = {
    "trl": {"training"},
    "httpx": {"judges/endpoint.py"},
    "cma": {"experiments/optimization.py"},
    "lm_eval": {"experiments/benchmarks.py"},
    "gradio": {"cli/mixing_page.py"},
    "rouge_score": {"experiments/lamp.py"},
    "matplotlib": {"analysis/plots"},
    "transformers": {"models", "judges", "training"},
    "typer": {"cli"},
    "rich": {"cli"},
}
LAZY = {"cli", "__init__.py", "__main__.py"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide layers"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_the_left(path):
    layer = name_of(path).split("/")[0]
    if layer.endswith(".py"):
        return
    allowed = MAY_IMPORT[layer] | {layer}
    for name, line in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "persona_lora":
            assert parts[1] in allowed, f"{path}:{line} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_third_parties_stay_behind_their_fences(path):
    name = name_of(path)
    for imported, line in imports(ast.parse(path.read_text())):
        fence = FENCES.get(imported.split(".")[0])
        if fence is not None:
            places = {name, name.split("/")[0], name.rpartition("/")[0]}
            assert places & fence, f"{path}:{line}: {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_our_own_modules_are_imported_at_the_top(path):
    if name_of(path).split("/")[0] in LAZY:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [name for name, _ in imports(node) if name.startswith("persona_lora")]
            assert not inner, f"{path}:{node.lineno} {node.name} imports {inner}"


def test_every_layer_is_in_the_table():
    layers = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert layers <= MAY_IMPORT.keys()
