"""The layering rule of docs/architecture.md, as two tables and a little ``ast``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "persona_lora"

# From left to right; siblings on one step do not know each other, but where KNOWS says so.
STEPS = (
    {"core"},
    {"models", "report"},
    {"judges", "steering", "projections", "profiles"},
    {"training", "data", "engines"},
    {"studies"},
    {"playground", "serving", "cli"},
)
KNOWS = {"judges": {"profiles"}, "cli": {"playground", "serving"}}

# Where a third party may be imported: layers, or single modules.
FENCES = {
    "trl": {"training"},
    "httpx": {"judges/endpoint.py"},
    "cma": {"studies/personas/search.py"},
    "optuna": {"studies/personas/search.py"},
    "lm_eval": {"studies/asking/capability.py"},
    "gradio": {"playground/mixing_page.py"},
    "fastapi": {"serving"},
    "uvicorn": {"serving"},
    "rouge_score": {"studies/personas/lamp.py"},
    "transformers": {"models", "judges", "training"},
    "typer": {"cli"},
    "rich": {"cli"},
}
LAZY = {"cli", "__init__.py", "__main__.py"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def to_the_left(layer: str) -> set[str]:
    place = next(index for index, step in enumerate(STEPS) if layer in step)
    return set().union(*STEPS[:place])


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
    allowed = to_the_left(layer) | {layer} | KNOWS.get(layer, set())
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


def test_pictures_are_drawn_in_figures_alone():
    for path in MODULES:
        drawn = [n for n, _ in imports(ast.parse(path.read_text())) if n.startswith("matplotlib")]
        assert not drawn or "figure" in path.stem, path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_reading_and_drawing_need_no_model(path):
    if not path.stem.startswith(("read", "figure")):
        return
    for name, line in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "persona_lora":
            assert parts[1] in {"core", "report"} or is_read_or_figure(parts), f"{path}:{line}"


def is_read_or_figure(parts: list[str]) -> bool:
    return parts[1] == "studies" and any(p.startswith(("read", "figure")) for p in parts[2:])


def test_no_two_modules_have_one_name():
    """Besides ``__init__``, and the ``run``, ``read`` and ``figure`` of each study."""
    names = [
        path.stem for path in MODULES if path.stem not in {"__init__", "run", "read", "figure"}
    ]
    assert sorted(names) == sorted(set(names))


def test_every_layer_is_in_the_table():
    layers = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert layers == set().union(*STEPS)
