"""A gallery gives back what was packed, as near as eight bits are, and refuses what is not one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.core.gallery import BASIS, RECORD, Gallery, write_gallery
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.strength import Moved, Strengths, file_beside, strength_line

SHAPES = {"model.layers.0.mlp.up_proj": (40, 12), "model.layers.1.self_attn.q_proj": (24, 12)}


def member(trait: str | None, seed: int, size: float = 1.0, drawn: int = 0) -> LoRADiff:
    """Return a diff of the family whose A is drawn by ``drawn``."""
    frozen, own = (torch.Generator().manual_seed(each) for each in (drawn, 100 + seed))
    factors = {
        module: LoRAFactors(
            torch.randn(4, width, generator=frozen).bfloat16().float(),
            size * torch.randn(out, 4, generator=own),
        )
        for module, (out, width) in SHAPES.items()
    }
    sources = {"training": {"num_pairs": 3}, "seed": seed, "pos": "/srv/somebody/pos"}
    return LoRADiff(factors, BaseModel("tiny", "f1"), trait, sources)


@pytest.fixture
def family(tmp_path):
    """The diffs of two traits of very different size, and their paths."""
    diffs = {"evil": member("evil", 1, 1e-6), "formality": member("formality", 2, 1e5)}
    return diffs, [diff.save(tmp_path / trait / "diff") for trait, diff in diffs.items()]


def test_a_gallery_holds_a_once_and_b_to_three_bits_of_mantissa(family, tmp_path):
    diffs, paths = family
    errors = write_gallery(paths, tmp_path / "gallery")
    gallery = Gallery(tmp_path / "gallery")
    assert gallery.traits == ["evil", "formality"]
    for trait, diff in diffs.items():
        found = gallery.exhibit(trait).diff
        for module, each in diff.factors.items():
            assert torch.equal(found.factors[module].A, each.A)
            torch.testing.assert_close(found.factors[module].B, each.B, rtol=2**-4, atol=0)
        assert errors[trait] == pytest.approx((found - diff).norm() / diff.norm(), rel=1e-6)
        assert 0 < errors[trait] < 0.04
        assert (found.trait, found.base_model) == (trait, diff.base_model)
        assert found.sources == {"training": {"num_pairs": 3}, "seed": diff.sources["seed"]}
    assert "somebody" not in (tmp_path / "gallery" / "evil.safetensors").read_bytes().decode(
        "latin"
    )


def test_packing_what_was_unpacked_changes_nothing_and_takes_strengths_along(family, tmp_path):
    write_gallery(family[1], tmp_path / "once")
    paths = [tmp_path / "out" / trait / "diff" for trait in family[0]]
    for trait, path in zip(family[0], paths, strict=True):
        exhibit = Gallery(tmp_path / "once").exhibit(trait)
        exhibit.save(path)
        assert not file_beside(path).exists()
        with pytest.raises(UserError, match=f"nats of {trait} were not measured"):
            exhibit.coefficient(0.1)
    plain = LoRADiff.load(paths[0])
    points = (
        Moved(-8.0, 0.1, 0.2, coherence=90.0),
        Moved(16.0, 0.1, 0.2, coherence=80.0),
    )  # 5.7 and 11.3 at 0.05 nats
    Strengths(plain.content(), "", "p", points, 50.0, weighted_norm=3.0).save(paths[0])
    Strengths("of another", "", "p", points).save(paths[1])
    assert write_gallery(paths, tmp_path / "twice") == {"evil": 0.0, "formality": 0.0}
    once, twice = Gallery(tmp_path / "once"), Gallery(tmp_path / "twice")
    for trait, size in (("evil", 8.0), ("formality", 1.0)):
        scaled = once.exhibit(trait).diff * size
        assert twice.exhibit(trait).diff.content() == scaled.content()
    assert [twice.exhibit("evil").coefficient(each) for each in (-0.1, 0.1)] == [-1.0, 2.0]
    assert twice.exhibit("evil").strengths.weighted_norm == 8.0 * 3.0
    assert twice.exhibit("formality").strengths is None
    twice.exhibit("evil").save(tmp_path / "new" / "diff")
    again = LoRADiff.load(tmp_path / "new" / "diff")
    said = strength_line(tmp_path / "new" / "diff", again.content())
    assert "coherent from -1 (as far as was measured) to +2 (as far as was measured)" in said
    write_gallery([tmp_path / "new" / "diff"], tmp_path / "thrice")
    before, after = (Gallery(tmp_path / each).exhibit("evil") for each in ("twice", "thrice"))
    assert after.diff.content() == before.diff.content()
    assert after.strengths == before.strengths


def test_a_b_of_zeros_stays_zeros(tmp_path):
    diff = member("evil", 1, 0.0)
    other = {module: LoRAFactors(each.A, each.B + 1) for module, each in diff.factors.items()}
    kept = {**other, next(iter(other)): diff.factors[next(iter(other))]}
    write_gallery([replace(diff, factors=kept).save(tmp_path / "diff")], tmp_path / "gallery")
    found = Gallery(tmp_path / "gallery").exhibit("evil").diff.factors
    assert [float(each.B.sum()) for each in found.values()] == [0.0, 24.0 * 4]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (member("formality", 2, drawn=7), r"formality has another A .*\(train --family\)"),
        (member("evil", 2), "is of evil, as one before it is"),
        (member(None, 2), "the trait of .* must be like a file's name"),
        (member("../up", 2), "the trait of .* must be like a file's name"),
        (member("basis", 2), "is of a trait called basis"),
        (replace(member("formality", 2), base_model=BaseModel("big", "f2")), "different base"),
    ],
)
def test_what_is_no_family_is_refused_and_nothing_is_written(family, tmp_path, second, message):
    path = second.save(tmp_path / "second" / "diff")
    with pytest.raises(UserError, match=message):
        write_gallery([family[1][0], path], tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()


def test_what_is_no_gallery_or_belongs_to_another_is_named(family, tmp_path):
    with pytest.raises(UserError, match=r"is no gallery: it has no basis\.safetensors"):
        Gallery(tmp_path / "nothing")
    write_gallery(family[1], tmp_path / "gallery")
    folder = tmp_path / "gallery"
    with pytest.raises(UserError, match=r"has no diff of 'evl'; did you mean 'evil'\?"):
        Gallery(folder).exhibit("evl")
    path = folder / "evil.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"evil\.safetensors is not a readable safetensors file"):
        Gallery(folder).exhibit("evil")
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"evil\.safetensors is no file of a gallery"):
        Gallery(folder).exhibit("evil")
    path.write_bytes(whole)
    for tensors in ({"x": torch.ones(4, 12)}, {module: torch.ones(3, 12) for module in SHAPES}):
        save_file(tensors, folder / BASIS, metadata={RECORD: json.dumps({})})
        with pytest.raises(UserError, match=r"evil\.safetensors does not belong to basis"):
            Gallery(folder).exhibit("evil")


@pytest.mark.parametrize("sources", [[], "mine", {"training": "lr 1e-4"}])
def test_sources_that_are_no_record_are_refused_with_the_file(family, tmp_path, sources):
    write_gallery(family[1], tmp_path / "gallery")
    path = tmp_path / "gallery" / "evil.safetensors"
    with safe_open(path, framework="pt") as stream:
        record = json.loads(stream.metadata()[RECORD])
    told = {RECORD: json.dumps({**record, "sources": sources})}
    save_file(load_file(path), path, metadata=told)
    with pytest.raises(
        UserError, match=r"evil\.safetensors.*says of its sources must be an object"
    ):
        Gallery(tmp_path / "gallery").exhibit("evil")
