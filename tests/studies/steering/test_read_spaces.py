"""What is read off a run on two spaces, from rows with planted values."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import torch

from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.runs import Run
from persona_lora.models.structure import plain_linear_modules
from persona_lora.report import wording
from persona_lora.studies.steering.read_spaces import (
    FIRST_WORD,
    lines_of,
    mean_over_seeds,
    plain_table,
    read_spaces,
    shape_line,
    spaces_content,
    spaces_picture,
    traits_table,
    words_table,
)
from persona_lora.studies.steering.spaces import spectra
from tests.models.architectures import FAMILIES, tiny_model

TRAITS, SEEDS = ("evil", "kind", "wry"), ("seed0", "seed1")


def word(method, seed, trait, text, change, place=FIRST_WORD):
    said = {"method": method, "seed": seed, "trait": trait, "place": place, "text": text}
    return {**said, "token": 1, "change": change, "low": change - 0.1, "high": change + 0.1}


@pytest.fixture
def run(tmp_path):
    """Two seeds of three traits; wry's second seed is taken for kind."""
    found = Run.open(tmp_path / "spaces", command="spaces", config={"layer": 3}, seed=0)
    lost = ("seed1", "wry", "kind")
    cosine = {
        (seed, one, other): 0.9 if (seed, one, other) == lost else 0.6 if one == other else -0.2
        for seed, one, other in product(SEEDS, TRAITS, TRAITS)
    }
    found.write(
        "shifts",
        [
            {"seed": seed, "trait": one, "other": other, "layer": layer, "cosine": value / layer}
            for (seed, one, other), value in cosine.items() for layer in (1, 3)
        ],
    )  # fmt: skip
    found.write(
        "spectra",
        [
            {"seed": seed, "trait": trait, "module": f"model.layers.{layer}.{part}.{kind}",
             "layer": layer, "kind": kind, "norm": norm, "rank": 8, "top_share": 0.5,
             "effective_rank": rank, "norm_plain": 2.0, "top_share_plain": 0.3,
             "effective_rank_plain": 7.0}
            for seed in SEEDS for trait in TRAITS for layer in (0, 1)
            for part, kind, norm, rank in (
                ("self_attn", "q_proj", 1.0, 2.0), ("mlp", "up_proj", 3.0, 4.0)
            )
        ],
    )  # fmt: skip
    found.write(
        "cosines",
        [
            {"seed": seed, "trait": one, "other": other, "weights": 0.1 + off,
             "weights_plain": 0.01, "activations": 0.2}
            for seed, off in zip(SEEDS, (-0.1, 0.3), strict=True)
            for one, other in combinations(TRAITS, 2)
        ],
    )  # fmt: skip
    found.write("agreement", [{"rho": 0.5, "p": 0.02, "n": 3}])
    found.write("recognition", [{"recognised": 5, "n": 6, "chance": 2.0, "mean": 0.2, "p": 0.03}])
    both = [*product(("weights",), SEEDS), ("activations", "")]
    found.write(
        "interference",
        [
            {"method": method, "seed": seed, "steered": one, "read": other,
             "value": 1.0 if one == other else 0.25}
            for method, seed in both for one, other in product(TRAITS, TRAITS)
        ],
    )  # fmt: skip
    found.write(
        "linearity",
        [
            {"method": method, "seed": seed, "trait": one, "other": other,
             "residual": 0.1 if seed == "seed0" else 0.3}
            for method, seed in both for one, other in combinations(TRAITS, 2)
        ],
    )  # fmt: skip
    found.write(
        "seeds",
        [
            {"trait": one, "other": other, "seeds": list(SEEDS), "weights_plain": 0.05,
             "weights": 0.7 if one == other else 0.1}
            for one, other in product(TRAITS, TRAITS)
        ],
    )  # fmt: skip
    found.write(
        "words",
        [
            word("weights", "seed0", "evil", " once", 9.0),
            word("weights", "seed0", "evil", " fool", 2.0),
            word("weights", "seed0", "evil", " dear", -1.0),
            word("weights", "seed0", "evil", " read", 5.0, place="while reading"),
            word("weights", "seed1", "evil", " fool", 1.0),
            word("weights", "seed1", "evil", "\n", 3.0),
            word("weights", "seed0", "kind", " fool", 1.0),
            word("weights", "seed0", "kind", " love", 1.0),
            word("activations", "", "evil", " ha", 1.0),
        ],
    )
    return found


def test_traits_are_read_over_seeds(run):
    found = read_spaces(run)
    assert (found.layer, found.seeds, found.pairs, found.rho) == (3, 2, 3, 0.5)
    assert (found.recognised, found.n) == (5, 6)
    assert (found.p_agreement, found.p_recognition) == (0.04, 0.04)  # Holm over the two
    evil, _, wry = found.traits
    assert (evil.trait, evil.nearest, wry.nearest) == ("evil", ["evil"] * 2, ["wry", "kind"])
    assert evil.cosines == pytest.approx([0.2, 0.2])
    assert (evil.shape.attention, evil.shape.layers) == pytest.approx((0.1, 2.0))
    assert (evil.plain.attention, evil.plain.ranks) == (pytest.approx(0.5), [7.0] * 8)
    assert found.same == [(0.7, 0.05)] * 3
    assert found.different == [(0.1, 0.05)] * 6
    row = traits_table(found).rows[2]
    assert row[:5] == ("Wry", "3.0 [2.0, 4.0]", "50%", "2.0", "10%, 90%")
    assert row[5:] == ("0.20 [0.20, 0.20]", "1 of 2")
    (beside,) = plain_table(found)
    assert beside.rows[2] == ("Wry", "7.0 [7.0, 7.0]", "30%", "2.0", "50%, 50%")
    said = shape_line(found, lambda shapes: str(shapes[0].top_share))
    assert said == "0.5 weighted by inputs (plain 0.3)"


def test_a_run_of_before_has_plain_shapes_alone_and_says_so(run):
    kept = [
        {key: value for key, value in row.items() if not key.endswith("_plain")}
        for row in run.read("spectra")
    ]
    weighted, drawn = read_spaces(run), _texts(spaces_picture(run))
    run.write("spectra", kept)
    before = read_spaces(run)
    assert "‖·‖ is weighted" in traits_table(weighted).note
    assert "‖·‖ is plain" in traits_table(before).note
    assert traits_table(before).rows == traits_table(weighted).rows
    assert (plain_table(before), before.traits[0].plain) == ([], None)
    assert shape_line(before, lambda shapes: str(shapes[0].top_share)) == "0.5"
    assert "weighted" in drawn
    assert "weighted" not in _texts(spaces_picture(run))


def _texts(picture):
    return " ".join(each.get_text() for each in picture.figure.texts)


def test_sentences_and_section_say_the_same(run):
    first, second, third = lines_of(read_spaces(run))
    assert "3 traits, each trained 2 times" in first
    assert "nearest for 5 of 6 (p = 0.040)" in first
    assert "ρ of 0.50 (p = 0.040)" in second
    assert "0.70 [0.70, 0.70] (plain 0.05" in third
    content = spaces_content(run)
    assert content.lead == first
    titles = [each.title for each in content.blocks if hasattr(each, "columns")]
    assert [each.partition(",")[0] for each in titles] == [
        "Differences by trait", "The same", "Words made likelier", "Pairs of traits",
        "Two at once against the sum",
    ]  # fmt: skip
    sums = content.blocks[-1].rows
    assert [row[3] for row in sums if row[0] == "weights"] == ["0.200"] * 3  # the mean of seeds


def test_words_of_most_seeds_come_first_and_the_less_likely_ones_not_at_all(run):
    table = words_table(read_spaces(run))
    assert table.rows[0] == ("Evil", "␣fool ␣once ⏎", "␣ha")
    assert table.rows[2] == ("Wry", "", "")
    assert "Two seeds of a trait share 50% of them, two traits 50%." in table.note


def test_a_run_of_one_seed_without_words_is_read(run):
    for part in ("seeds", "words", "recognition"):
        (run.folder / f"{part}.jsonl").unlink()
    for part in ("shifts", "spectra", "cosines", "interference", "linearity"):
        rows = [row for row in run.read(part) if row.pop("seed") in ("seed0", "")]
        run.write(part, rows)
    found = read_spaces(run)
    assert (found.seeds, found.n, found.p_agreement, found.p_recognition) == (1, 3, 0.02, None)
    assert len(lines_of(found)) == 2
    assert "each trained" not in lines_of(found)[0]
    assert spaces_content(run).blocks


def test_means_over_seeds_are_of_numbers_that_differ_by_seed_alone():
    rows = [
        {"seed": seed, "trait": trait, "layer": layer, "value": value + layer}
        for seed, value in (("a", 1.0), ("b", 3.0))
        for trait in ("one", "two")
        for layer in (0, 1)
    ]
    found = mean_over_seeds(rows)
    assert found == [
        {"trait": trait, "layer": layer, "value": 2.0 + layer}
        for trait in ("one", "two")
        for layer in (0, 1)
    ]
    assert np.mean([row["value"] for row in found]) == 2.5


NEITHER = ("mixer", "mamba", "conv", "per_layer_input_gate", "per_layer_projection")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shares_of_attention_and_mlps_are_told_by_where_modules_lie(run, family):
    """Of every family, whatever its modules are called; a dash where some lie in neither."""
    names = plain_linear_modules(tiny_model(family))
    diff = LoRADiff(
        {name: LoRAFactors(torch.ones(1, 4), torch.ones(3, 1)) for name in names}, BaseModel("m")
    )
    rows = [{"seed": seed, **row} for seed in SEEDS for row in spectra(diff, diff, "evil")]
    run.write("spectra", [*rows, *(r for r in run.read("spectra") if r["trait"] != "evil")])
    found = read_spaces(run)
    if any(f".{part}" in name for name in names for part in NEITHER):
        assert found.traits[0].shape.attention is None
        assert traits_table(found).rows[0][4] == wording.NONE
    else:
        attention = [name for name in names if "attn" in name or "attention" in name]
        assert found.traits[0].shape.attention == pytest.approx(len(attention) / len(names))
        assert all("mlp" in n or "ffn" in n or "feed_forward" in n or ".fc" in n
                   for n in set(names) - set(attention))  # fmt: skip


def test_a_module_in_no_layer_changes_nothing_that_is_said_of_layers(run):
    """A difference that changes the output head, much, beside the same one that does not."""
    plain = run.read("spectra")
    head = {"module": "lm_head", "layer": None, "kind": "lm_head", "norm": 9.0, "rank": 8,
            "top_share": 0.4, "effective_rank": 3.0, "norm_plain": 9.0, "top_share_plain": 0.4,
            "effective_rank_plain": 3.0}  # fmt: skip
    before = read_spaces(run).traits
    heads = [{"seed": seed, "trait": trait, **head} for seed in SEEDS for trait in TRAITS]
    run.write("spectra", [*plain, *heads])
    after = read_spaces(run).traits
    for one, other in zip(before, after, strict=True):
        for geometry in ("shape", "plain"):
            x, y = getattr(one, geometry), getattr(other, geometry)
            assert (x.attention, x.layers) == (y.attention, y.layers)
    means = mean_over_seeds(run.read("spectra"))
    assert means[: len(plain) // 2] == mean_over_seeds(plain)
    assert [(row["kind"], row["effective_rank"]) for row in means[len(plain) // 2 :]] == [
        ("lm_head", 3.0)
    ] * len(TRAITS)
    assert spaces_content(run).blocks
    run.write("spectra", heads)
    assert traits_table(read_spaces(run)).rows[0][3:5] == (wording.NONE, wording.NONE)
