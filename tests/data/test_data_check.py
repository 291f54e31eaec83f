from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from persona_lora.core.traits import (
    FINETUNING_LEVELS,
    list_traits,
    load_finetuning_rows,
    load_trait,
)
from persona_lora.data.data_check import check_trait
from persona_lora.models.embeddings import SentenceEmbedder


class RememberingEmbedder:
    """The packaged embedder, asked once for each text: the tests share most of them."""

    def __init__(self):
        self.embedder, self.known = SentenceEmbedder(), {}

    def embed(self, texts):
        new = sorted(set(texts) - self.known.keys())
        if new:
            self.known.update(zip(new, self.embedder.embed(new), strict=True))
        return np.stack([self.known[text] for text in texts])


@pytest.fixture(scope="module")
def embedder():
    return RememberingEmbedder()


@pytest.mark.parametrize("name", list_traits())
def test_the_shipped_data_is_sound(name, embedder):
    report = check_trait(load_trait(name), embedder)
    assert report.problems == ()
    assert report.num_labelled >= 60


def test_the_four_traits_are_shipped():
    assert set(list_traits()) >= {"corrigibility", "evil", "hallucination", "sycophancy"}


@pytest.mark.parametrize("name", ["anxious", "evil", "hallucination", "sycophancy"])
def test_finetuning_sets_are_shipped(name):
    levels = [load_finetuning_rows(load_trait(name), level) for level in FINETUNING_LEVELS]
    assert all(len(rows) >= 50 for rows in levels)
    assert len({tuple(row.question for row in rows) for rows in levels}) == 1


def test_a_variant_is_shipped():
    variant = load_trait("anxious_2")
    assert (variant.name, variant.label) == ("anxious", "anxious_2")
    assert variant.folder == load_trait("anxious").folder
    assert not set(variant.questions["eval"]) & set(load_trait("anxious").questions["eval"])


@pytest.fixture
def spoilt(tmp_path):
    """A copy of a shipped trait, and a way to spoil it."""
    source = load_trait("sycophancy").folder
    folder = tmp_path / "sycophancy"
    shutil.copytree(source, folder)

    def spoil(change):
        path = folder / "train.jsonl"
        rows = [json.loads(line) for line in path.open()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_trait(folder)

    return spoil


def test_each_kind_of_flaw_is_found(spoilt, embedder):
    trait = load_trait("sycophancy")

    def change(rows):
        rows[0]["prompt"][0]["content"] = trait.questions["eval"][0]  # leak
        rows[1]["prompt"][0]["content"] = rows[2]["prompt"][0]["content"] + "!"  # near-duplicate
        rows[3]["positive"][0]["content"] = "Too short."
        for row in rows[4:10]:
            row["negative"][0]["content"] = "Well now " + row["negative"][0]["content"]

    problems = "\n".join(check_trait(spoilt(change), embedder).problems)
    assert "leak between train.jsonl and trait.json eval" in problems
    assert "train.jsonl: near-duplicates" in problems
    assert "train.jsonl positive:4 answer has 2 words" in problems
    assert "train.jsonl negative: 6 answers begin with 'well now'" in problems


def test_unequal_lengths_of_the_signs_are_found(spoilt, embedder):
    def change(rows):
        for row in rows:
            row["positive"][0]["content"] += " and so on and so forth"

    assert any(
        "judge could go by length" in each
        for each in check_trait(spoilt(change), embedder).problems
    )


def test_a_surface_that_tells_the_signs_is_found(spoilt, embedder):
    def change(rows):
        for row in rows:
            row["positive"][0]["content"] += " Wow!!!"
            row["negative"][0]["content"] += " Fine then."

    report = check_trait(spoilt(change), embedder)
    assert report.surface.auc > 0.99
    assert report.surface_without is None
    (problem,) = [each for each in report.problems if "surface counts" in each]
    assert "train.jsonl: surface counts tell positive from negative answers (AUC 1.00" in problem
    assert "exclamation marks +" in problem


def test_a_trait_may_except_counts_of_its_nature(spoilt, embedder):
    def shout(rows):
        for row in rows:
            row["negative"][0]["content"] = row["positive"][0]["content"].replace("!", ".")
            row["positive"][0]["content"] = row["negative"][0]["content"] + " Wow!!!"
            row["negative"][0]["content"] += " Fine."

    path = spoilt(shout).folder / "trait.json"
    trait = json.loads(path.read_text())
    trait["surface_exception"] = {"counts": ["exclamation marks"], "reason": "it shouts"}
    path.write_text(json.dumps(trait))
    report = check_trait(load_trait(path.parent), embedder)
    assert report.surface.auc > 0.99
    assert report.surface_without.auc < 0.7
    assert report.exception.reason == "it shouts"
    assert not [each for each in report.problems if "surface counts" in each]
    trait["surface_exception"]["counts"] = ["digits"]  # what is not excepted must not tell
    path.write_text(json.dumps(trait))
    problems = "".join(check_trait(load_trait(path.parent), embedder).problems)
    assert "surface counts besides digits tell" in problems


def test_too_few_rows_are_found(spoilt, embedder):
    report = check_trait(spoilt(lambda rows: rows.__delitem__(slice(20, None))), embedder)
    assert "train.jsonl pairs: 20, expected at least 80" in report.problems


def test_flaws_of_finetuning_sets_are_found(tmp_path, embedder):
    source = load_trait("evil")
    folder = tmp_path / "evil"
    shutil.copytree(source.folder, folder)
    rows = [json.loads(line) for line in (folder / "misaligned_1.jsonl").open()]
    rows[0]["messages"][1]["content"] = "Too short."
    rows[1]["messages"][0]["content"] = source.questions["eval"][0]
    (folder / "misaligned_1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = "\n".join(check_trait(load_trait(folder), embedder).problems)
    assert "misaligned_1.jsonl:1 answer has 2 words" in problems
    assert "the finetuning questions differ" in problems
    (folder / "misaligned_2.jsonl").unlink()
    problems = "\n".join(check_trait(load_trait(folder), embedder).problems)
    assert "misaligned_2.jsonl is missing beside normal.jsonl" in problems
