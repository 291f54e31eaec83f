"""The user's own folders come first; what comes along with the package is found from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from persona_lora.core import resources
from persona_lora.core.errors import UserError
from persona_lora.core.personas import list_personas, load_persona, load_persona_prompts
from persona_lora.core.resources import resource_path, search_folders
from persona_lora.core.runs import git_commit
from persona_lora.core.traits import list_traits, load_trait

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The package as a wheel lays it down, beside a foreign package called datasets."""
    site = tmp_path / "site"
    (site / "datasets" / "foreign").mkdir(parents=True)
    carried = site / "persona_lora" / "shipped"
    for name in ("datasets/evil", "personas/episode-000101_B"):
        shutil.copytree(ROOT / name, carried / name)
    shutil.copy(ROOT / "personas/prompts.json", carried / "personas")
    monkeypatch.setattr(resources, "PACKAGE", site / "persona_lora")
    return carried


def test_what_comes_along_is_found_from_an_empty_folder(empty_folder, installed):
    assert list_traits() == ["evil"]
    assert load_trait("evil").folder == installed / "datasets" / "evil"
    assert list_personas() == ["episode-000101_B"]
    assert load_persona("episode-000101_B").folder.parent == installed / "personas"
    assert load_persona_prompts().train
    assert git_commit() is None


def test_the_own_trait_of_a_name_wins_and_hides_no_other(empty_folder, installed):
    own = empty_folder / "datasets" / "cheer"
    shutil.copytree(ROOT / "datasets" / "evil", own)
    trait = json.loads((own / "trait.json").read_text())
    (own / "trait.json").write_text(json.dumps({**trait, "name": "cheer"}))
    assert list_traits() == ["cheer", "evil"]
    assert load_trait("cheer").folder == Path("datasets/cheer")
    assert load_trait("evil").folder == installed / "datasets" / "evil"
    shutil.copytree(ROOT / "datasets" / "evil", own.with_name("evil"))
    assert load_trait("evil").folder == Path("datasets/evil")


def test_a_given_folder_is_the_only_one(empty_folder, installed, tmp_path):
    assert list_traits(tmp_path) == []
    with pytest.raises(UserError, match="no trait 'evil'"):
        load_trait("evil", tmp_path)
    with pytest.raises(UserError, match="no persona"):
        load_persona("episode-000101_B", tmp_path)


def test_names_of_files_that_come_along_are_found_and_others_stay(empty_folder):
    found = resource_path(Path("train_configs/sycophancy.yaml"))
    assert found == ROOT / "train_configs" / "sycophancy.yaml"
    for other in (
        "train_configs/none.yaml",
        "results/a.csv",
        "/nowhere/datasets",
        "datasets/x",
        "",
    ):
        assert resource_path(Path(other)) == Path(other)
    own = Path("train_configs/sycophancy.yaml")
    own.parent.mkdir()
    own.write_text("trait: evil\n")
    assert resource_path(own) == own


def test_in_the_checkout_its_folders_are_searched_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert search_folders("datasets") == [Path("datasets")]
