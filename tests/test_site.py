"""The documentation site: every page has its place in it, and every public name its reference.

The build itself needs the docs extra: bash scripts/docs.sh.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import yaml

import persona_lora

ROOT = Path(__file__).resolve().parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for each in inner for page in pages(each)]


def test_every_page_stands_in_the_navigation_once():
    listed = pages(SITE["nav"])
    docs = ROOT / SITE["docs_dir"]
    assert sorted(listed) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


def test_the_site_is_built_where_git_does_not_look():
    assert SITE["site_dir"].startswith("build/")
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_reference_has_every_public_name_from_where_it_is_defined():
    page = (ROOT / "docs" / "reference.md").read_text()
    shown = dict(
        reversed(path.rsplit(".", 1)) for path in re.findall(r"^::: ([\w.]+)$", page, re.M)
    )
    assert sorted([*shown, "__version__"]) == sorted(persona_lora.__all__)
    for name, module in shown.items():
        assert getattr(importlib.import_module(module), name) is getattr(persona_lora, name)
        assert getattr(persona_lora, name).__module__ == module
