"""A built wheel, unpacked far from the checkout, has all that its commands read."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("datasets", "personas", "train_configs", "gallery")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel of this checkout, laid down as an installer would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files_of(folder: Path) -> dict[str, bytes]:
    skip = {"__pycache__", "shipped"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not skip & set(path.relative_to(folder).parts)
    }


def test_the_wheel_carries_the_package_and_its_data(unpacked):
    assert files_of(unpacked / "persona_lora") == files_of(ROOT / "persona_lora")
    assert {"py.typed", "report/page.html.j2"} <= files_of(unpacked / "persona_lora").keys()
    for name in SHIPPED:
        assert files_of(unpacked / "persona_lora" / "shipped" / name) == files_of(ROOT / name)
    top = {path.name for path in unpacked.iterdir()}
    assert top == {"persona_lora", *(name for name in top if name.endswith(".dist-info"))}


READ_EVERYTHING = """
import persona_lora.cli
from persona_lora.core.personas import list_personas, load_persona, load_persona_prompts
from persona_lora.core.resources import resource_path
from persona_lora.core.traits import Path, list_traits, load_pairs, load_trait
print(load_persona_prompts().train[0])
for name in list_personas():
    print(load_persona(name).folder)
for name in list_traits():
    print(load_pairs(load_trait(name)) and load_trait(name).folder)
print(resource_path(Path("train_configs/sycophancy.yaml")).resolve(strict=True))
"""


def test_the_wheel_reads_its_data_from_an_empty_folder(unpacked, tmp_path):
    """What it needs of others comes from here; persona_lora, and all that it reads, from there."""
    done = subprocess.run(
        [sys.executable, "-c", READ_EVERYTHING],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, *paths = done.stdout.splitlines()
    read = {str(Path(path).relative_to(unpacked / "persona_lora" / "shipped")) for path in paths}
    marks = [*ROOT.glob("datasets/*/trait.json"), *ROOT.glob("personas/*/conversations.jsonl")]
    there = {str(mark.parent.relative_to(ROOT)) for mark in marks}
    assert read == there | {"train_configs/sycophancy.yaml"}
