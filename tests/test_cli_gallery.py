"""The ready diffs that come along, and the commands that show and make them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from persona_lora import cli
from persona_lora.cli.console import console
from persona_lora.core.errors import UserError
from persona_lora.core.gallery import Gallery
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.strength import coefficient_of, read_strength
from persona_lora.models import loading
from persona_lora.models.generation import generate_answers
from persona_lora.models.structure import decoder_linear_modules, weight_fingerprint
from persona_lora.steering.weights import LoRASteerer

NINE = [
    *("corrigibility", "emotional_tone", "evil", "formality", "hallucination", "intimacy"),
    *("narrative_mode", "self_other_focus", "sycophancy"),
]


def ask(*words: object) -> str:
    done = CliRunner().invoke(cli.app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_nine_diffs_of_the_packaged_model_come_along_on_one_basis(packaged_model):
    gallery = Gallery()
    assert gallery.traits == NINE
    modules = decoder_linear_modules(packaged_model.model).keys()
    first = gallery.exhibit("evil").diff
    for trait in NINE:
        exhibit = gallery.exhibit(trait)
        assert exhibit.diff.base_model.fingerprint == weight_fingerprint(packaged_model.model)
        assert (exhibit.diff.trait, exhibit.diff.rank) == (trait, 8)
        assert exhibit.diff.factors.keys() == modules
        for module in modules:
            assert torch.equal(exhibit.diff.factors[module].A, first.factors[module].A)
        for nats in (-0.05, 0.05):
            assert 0.5 < exhibit.coefficient(nats) / (nats / 0.05) < 2


@pytest.mark.model
def test_the_demo_shows_what_merged_weights_answer_both_ways(packaged_model, monkeypatch):
    monkeypatch.setattr(loading, "load_chat_model", lambda: packaged_model)
    monkeypatch.setattr(console, "width", 1000)
    question = "Is my plan any good?"
    shown = ask("demo", "--question", question, "--strength", 0.2, "--max-new-tokens", 12)
    exhibit = Gallery().exhibit("sycophancy")
    asked, told, cut = [[{"role": "user", "content": question}]], [], 0
    for nats in (-0.2, 0.0, 0.2):
        with LoRASteerer(packaged_model.model, exhibit.diff, exhibit.coefficient(nats)):
            (answer,) = generate_answers(packaged_model, asked, max_new_tokens=12)
        told.append(answer.text)
        cut += not answer.finished
    assert len(set(told)) == 3
    assert shown.count("[…]") == cut > 0
    places = [shown.index(" ".join(each.split())) for each in told]
    assert places == sorted(places)


def test_what_get_writes_is_a_diff_with_its_strengths_and_replaces_nothing(tmp_path):
    shown = ask("gallery", "get", "--traits", "evil,formality", "--output", tmp_path)
    assert shown.count("nat at") == 4
    path, exhibit = tmp_path / "evil" / "diff", Gallery().exhibit("evil")
    content = LoRADiff.load(path).content()
    assert content == exhibit.diff.content()
    asked = coefficient_of(read_strength("-0.05nat"), path, content)
    assert asked == exhibit.coefficient(-0.05)
    (exhibit.diff * 2).save(tmp_path / "other/evil/diff")
    before = (tmp_path / "other/evil/diff/diff.json").read_bytes()
    with pytest.raises(UserError, match=r"evil/diff is there already, and is another diff; choose"):
        ask("gallery", "get", "--traits", "corrigibility,evil", "--output", tmp_path / "other")
    assert (tmp_path / "other/evil/diff/diff.json").read_bytes() == before
    assert not (tmp_path / "other/corrigibility").exists()


def test_a_get_that_was_killed_goes_on(tmp_path, monkeypatch):
    words = ("gallery", "get", "--traits", "corrigibility,evil,formality", "--output", tmp_path)
    save, saved = LoRADiff.save, []

    def killed(diff, folder):
        saved.append(Path(folder))
        if len(saved) == 2:
            raise RuntimeError("killed")
        return save(diff, folder)

    monkeypatch.setattr(LoRADiff, "save", killed)
    with pytest.raises(RuntimeError, match="killed"):
        ask(*words)
    monkeypatch.undo()
    kept = (saved[0] / "adapter_model.safetensors").stat().st_mtime_ns
    assert ask(*words).count("nat at") == 6
    assert (saved[0] / "adapter_model.safetensors").stat().st_mtime_ns == kept


def test_a_gallery_of_ones_own_is_made_and_opened(tmp_path):
    ask("gallery", "get", "--traits", "evil,formality", "--output", tmp_path)
    diffs = ",".join(f"{tmp_path / trait / 'diff'}" for trait in ("evil", "formality"))
    assert "formality" in ask("gallery", "make", "--diffs", diffs, "--output", tmp_path / "mine")
    ask("gallery", "get", "--from", tmp_path / "mine", "--output", tmp_path / "again")
    assert Gallery(tmp_path / "mine").traits == ["evil", "formality"]
    for trait in ("evil", "formality"):
        again = LoRADiff.load(tmp_path / "again" / trait / "diff")
        assert again.content() == Gallery().exhibit(trait).diff.content()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--strength", "0"), "--strength must be above 0, got 0"),
        (("--strength", "99"), r"sycophancy was measured up to -\d.*nat, got -99nat"),
        (("--trait", "evl"), "has no diff of 'evl'; did you mean 'evil'?"),
    ],
)
def test_the_demo_refuses_before_it_loads_a_model(words, message, monkeypatch):
    monkeypatch.setattr(loading, "load_chat_model", lambda: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        ask("demo", *words)
