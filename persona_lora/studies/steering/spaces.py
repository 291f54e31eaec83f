"""Do the two spaces agree? What a weight difference does to activations; how traits meet in both.

For every trait a LoRA difference L and a steering vector v: does adding c·L to the weights move the
hidden states along v? Do traits that are near in one space stand near in the other? Is the effect
of two differences at once the sum of their effects? Which words does each promote? Differences of
several training seeds are asked one seed after another, and laid beside one another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, LoRAFactors, layer_number, mix
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.vector_files import load_vector
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange, next_tokens
from persona_lora.models.loading import ChatModel
from persona_lora.projections.inputs import (
    ModuleInputs,
    kept_inputs,
    load_ordinary_prompts,
    shared_beginning,
    tokenized_prompts,
)
from persona_lora.report.resampling import Array, share_of_orders
from persona_lora.report.scores import grouped
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.bank import Bank, bank_of_diffs, bank_of_vectors, steer_live
from persona_lora.steering.placement import check_base_model
from persona_lora.steering.steerer import Steerer, Together, Unsteered
from persona_lora.studies.asking.run import contents_of, open_run
from persona_lora.studies.promoted_words import changed_words
from persona_lora.studies.read_seeds import seeds_of_traits
from persona_lora.studies.steering.calibration import equal_effect_scales
from persona_lora.studies.steering.divergence import ordinary_texts

RESPONSE = "response_avg"
WEIGHTS, ACTIVATIONS = METHODS = "weights", "activations"
FEW_PROMPTS = 8
Rows = Iterable[Mapping[str, Any]]
DiffsBySeed = Mapping[str, Mapping[str, LoRADiff]]
"""Diffs by training seed and trait; the one seed of diffs that say none is ""."""

CHECKED = {"allow_other_base": True}  # the run has held every direction against its model
FEW_TRAITS = "spaces need a diff and a vector of the same traits, two at least"


@dataclass(frozen=True, eq=False)
class Spaces:
    """The traits of a study, with a diff and a vector each, and a coefficient of equal effect.

    ``scales`` are the coefficients by trait for the diffs and for the vectors (at ``layer``). What
    they do to the model is read on ``texts``.
    """

    chat_model: ChatModel
    texts: Sequence[TokenizedExchange]
    diffs: Mapping[str, LoRADiff]
    vectors: Mapping[str, SteeringVector]
    layer: int
    diff_scales: Mapping[str, float]
    vector_scales: Mapping[str, float]

    def __post_init__(self) -> None:
        if set(self.diffs) != set(self.vectors) or len(self.diffs) < 2:
            raise UserError(FEW_TRAITS)

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits, sorted."""
        return tuple(sorted(self.diffs))

    def states(self, steerer: Steerer = Unsteered()) -> Tensor:
        """Return the mean response states over all texts, ``[layers, hidden]``, in float64."""
        with steerer, progress.silent():
            sums = [
                batch.means[:, 0].double().sum(dim=0)
                for batch in stream_hidden_means(self.chat_model, self.texts, positions=(RESPONSE,))
            ]
        return torch.stack(sums).sum(dim=0) / len(self.texts)

    def shift(self, method: str, traits: Sequence[str], base: Tensor) -> Tensor:
        """Return how far traits move the last layer's mean state from ``base``, together."""
        return self.states(self.steerer(method, traits))[-1] - base

    def steerer(self, method: str, traits: Sequence[str]) -> Steerer:
        """Return what steers by the directions of traits at once, each at its scale."""
        chat_model = self.chat_model
        if method == WEIGHTS:
            terms = {
                self.diffs[trait]: self.diff_scales[trait] * traits.count(trait)
                for trait in dict.fromkeys(traits)
            }
            return steer_live(chat_model, {mix(terms): 1.0})
        return Together(
            [
                ActivationSteerer(
                    chat_model.model,
                    self.vectors[trait].at([self.layer]),
                    self.vector_scales[trait],
                    positions="all",
                    allow_other_base=chat_model.allow_other_base,
                )
                for trait in traits
            ]
        )


def directions_among(
    diffs: DiffsBySeed, vectors: Mapping[str, SteeringVector]
) -> list[LoRADiff | SteeringVector]:
    """Return every trait's diffs and vector."""
    return [*vectors.values(), *(diff for own in diffs.values() for diff in own.values())]


def run_spaces(
    chat_model: ChatModel,
    diffs: DiffsBySeed,
    vectors: Mapping[str, SteeringVector],
    layer: int,
    output: Output | Path,
    *,
    datasets: Path | None = None,
) -> Run:
    """Compare the two spaces over several traits into the run ``output``; parts there are kept.

    All directions are brought to equal effect first. Writes ``scales_*``, ``shifts``, ``spectra``,
    ``cosines``, ``agreement``, ``recognition``, ``interference``, ``linearity``, ``words`` and, of
    diffs of several training seeds, ``seeds``.
    """
    made, anyway = directions_among(diffs, vectors), chat_model.allow_other_base
    check_base_model(chat_model.model, made, allow_other_base=anyway)
    ordinary = load_ordinary_prompts(datasets)
    named = {
        f"{trait}, {seed}" if seed else trait: diff
        for seed, own in diffs.items()
        for trait, diff in own.items()
    }
    config = {
        "traits": sorted(vectors),
        "layer": layer,
        "diff_norms": {name: diff.norm() for name, diff in named.items()},
    }
    read = contents_of("diff", named), contents_of("vector", vectors)
    prompts = {"the ordinary prompts": digest_of(ordinary)}
    run = open_run(output, "spaces", chat_model, config, *read, prompts)
    with run:
        inputs = kept_inputs(chat_model, ordinary)
        seeds = _at_equal_effect(run, chat_model, diffs, vectors, layer, ordinary[:FEW_PROMPTS])
        _each(run, "shifts", seeds, shift_cosines)
        _each(run, "spectra", seeds, lambda own: trait_spectra(own, inputs))
        _each(run, "cosines", seeds, lambda own: trait_cosines(own, inputs))
        _kept(run, "agreement", lambda: [agreement(run.read("cosines"))])
        _kept(run, "recognition", lambda: [recognition(run.read("shifts"), layer)])
        _both(run, "interference", seeds, interference)
        _both(run, "linearity", seeds, linearity)
        _both(run, "words", seeds, lambda own, method: promoted(own, method, ordinary))
        if len(seeds) > 1:
            other_base = chat_model.allow_other_base
            _kept(run, "seeds", lambda: seed_cosines(diffs, inputs, allow_other_base=other_base))
    return run


def _kept(run: Run, name: str, make: Callable[[], Rows]) -> list[dict[str, Any]]:
    """Return the rows of a part of a run; those that are not there are made, and written."""
    if not run.read(name):
        run.write(name, make())
    return run.read(name)


def _each(
    run: Run, name: str, seeds: Mapping[str, Spaces], measure: Callable[[Spaces], Rows]
) -> None:
    """Keep what is measured of the spaces of every training seed."""
    rows = (
        {"seed": seed, **row}
        for seed, own in progress.over(name, [*seeds.items()])
        for row in measure(own)
    )
    _kept(run, name, lambda: rows)


def _both(
    run: Run, name: str, seeds: Mapping[str, Spaces], measure: Callable[[Spaces, str], Rows]
) -> None:
    """Keep what is measured of the diffs of every seed, and of vectors, which have none, once."""
    one = next(iter(seeds.values()))
    asked = [*((WEIGHTS, *item) for item in seeds.items()), (ACTIVATIONS, "", one)]
    rows = (
        {"method": method, "seed": seed, **row}
        for method, seed, own in progress.over(name, asked)
        for row in measure(own, method)
    )
    _kept(run, name, lambda: rows)


def _at_equal_effect(
    run: Run,
    chat_model: ChatModel,
    diffs: DiffsBySeed,
    vectors: Mapping[str, SteeringVector],
    layer: int,
    prompts: Sequence[str],
) -> dict[str, Spaces]:
    """Return the spaces of every training seed, whose scales are measured unless they are there."""

    def scales(kind: str, banks: Mapping[str, Bank]) -> dict[str, dict[str, float]]:
        def measured() -> Rows:
            for seed, bank in banks.items():
                with progress.stage("equal effect"):
                    found = equal_effect_scales(chat_model, bank, prompts)
                yield from ({"seed": seed, **dataclasses.asdict(each)} for each in found)

        rows = grouped(_kept(run, f"scales_{kind}", measured), lambda row: row["seed"])
        return {
            seed: {row["trait"]: row["coefficient"] for row in own} for seed, own in rows.items()
        }

    by_seed = scales("diffs", {seed: bank_of_diffs(own) for seed, own in diffs.items()})
    of_vectors = scales("vectors", {"": bank_of_vectors(vectors, [layer])})[""]
    texts = ordinary_texts(chat_model, prompts)
    return {
        seed: Spaces(chat_model, texts, own, vectors, layer, by_seed[seed], of_vectors)
        for seed, own in diffs.items()
    }


def trait_directions(
    traits: Sequence[str], folder: Path
) -> tuple[DiffsBySeed, dict[str, SteeringVector]]:
    """Load every trait's diffs and mean-difference vector; UserError if one is not there.

    Diffs are ``{trait}/diff``, or ``{trait}/seed*/diff`` of several training seeds, which must be
    the same ones for every trait.
    """
    if len(traits) < 2:
        raise UserError(FEW_TRAITS)
    seeds = seeds_of_traits(folder, traits)
    diffs: dict[str, dict[str, LoRADiff]] = {seed: {} for seed in seeds}
    vectors = {}
    for trait in traits:
        vector = folder / "vectors" / trait / f"{trait}_response_avg.safetensors"
        own = {seed: folder / trait / seed / "diff" for seed in seeds}
        for path in (*own.values(), vector):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist; make it with: bash scripts/compare_steering.sh {trait}"
                )
        vectors[trait] = load_vector(vector)
        for seed, path in own.items():
            diffs[seed][trait] = LoRADiff.load(path)
    return diffs, vectors


def shift_cosines(spaces: Spaces) -> list[dict[str, Any]]:
    """Return rows of trait, other, layer, cosine: the shift under a trait's diff against a vector.

    The shift is the mean change of the response's hidden states when the diff is held at its scale,
    (h₊ − h₋) / 2 over both signs, which leaves out what is even in the coefficient.
    """
    rows = []
    for trait in spaces.traits:
        scale = spaces.diff_scales[trait]
        plus, minus = (
            spaces.states(steer_live(spaces.chat_model, {spaces.diffs[trait]: c}))
            for c in (scale, -scale)
        )
        shift = (plus - minus) / 2  # [layers, hidden]
        for other, vector in spaces.vectors.items():
            for layer, own in vector.directions.items():
                cosine = float(torch.cosine_similarity(shift[layer], own.double(), dim=0))
                rows.append({"trait": trait, "other": other, "layer": layer, "cosine": cosine})
    return rows


def trait_spectra(spaces: Spaces, inputs: ModuleInputs) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``spectra`` of every trait's diff, weighted by ``inputs``."""
    for trait, diff in spaces.diffs.items():
        weighed = inputs.weigh(diff, allow_other_base=spaces.chat_model.allow_other_base)
        yield from spectra(diff, weighed, trait)


def spectra(diff: LoRADiff, weighed: LoRADiff, trait: str) -> list[dict[str, Any]]:
    """Return layer, kind, norm, top share of ‖·‖² and effective rank of every module changed.

    They are those of ``weighed``, the diff as ``ModuleInputs.weigh`` returns it; ``norm_plain`` and
    so on are the diff's own. Modules in which either is zero are left out.
    """
    rows = []
    for name, factors in diff.factors.items():
        own, plain = (_spectrum(each.factors[name]) for each in (weighed, diff))
        if own and plain:
            place = {"layer": layer_number(name), "kind": name.rsplit(".", 1)[-1]}
            beside = {f"{key}_plain": value for key, value in plain.items()}
            measured = {**own, **beside, "rank": factors.rank}
            rows.append({"trait": trait, "module": name, **place, **measured})
    return rows


def _spectrum(factors: LoRAFactors) -> dict[str, float]:
    """Return norm, top share and effective rank of B·A; nothing of a product that is zero.

    The effective rank is exp of the entropy of the shares σᵢ² / Σσ² (Roy and Vetterli 2007).
    """
    core = torch.linalg.qr(factors.B.double()).R @ torch.linalg.qr(factors.A.double().T).R.T
    squares = torch.linalg.svdvals(core).square()
    total = float(squares.sum())
    if total == 0:
        return {}
    shares = (squares / total)[squares > 0]
    return {
        "norm": math.sqrt(total),
        "top_share": float(shares.max()),
        "effective_rank": math.exp(-float((shares * shares.log()).sum())),
    }


def trait_cosines(spaces: Spaces, inputs: ModuleInputs) -> list[dict[str, Any]]:
    """Return one row per pair of traits: the cosine of diffs, and of vectors at the layer.

    That of diffs is weighted by ``inputs``; ``weights_plain`` is not.
    """
    other_base, layer = spaces.chat_model.allow_other_base, spaces.layer
    weighed = {
        trait: inputs.weigh(diff, allow_other_base=other_base)
        for trait, diff in spaces.diffs.items()
    }
    return [
        {
            "trait": one,
            "other": other,
            "weights": weighed[one].cosine(weighed[other]),
            "weights_plain": spaces.diffs[one].cosine(spaces.diffs[other], **CHECKED),
            "activations": spaces.vectors[one].cosine(spaces.vectors[other], **CHECKED)[layer],
        }
        for one, other in combinations(spaces.traits, 2)
    ]


def seed_cosines(
    diffs: DiffsBySeed, inputs: ModuleInputs, *, allow_other_base: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield rows of two diffs of different training seeds, of one trait or two: their cosines."""
    weighed = {
        (seed, trait): (inputs.weigh(diff, allow_other_base=allow_other_base), diff)
        for seed, own in diffs.items()
        for trait, diff in own.items()
    }
    pairs = [each for each in combinations(weighed, 2) if each[0][0] != each[1][0]]
    for one, other in progress.over("seeds", pairs):
        weights, plain = (
            a.cosine(b, **CHECKED) for a, b in zip(weighed[one], weighed[other], strict=True)
        )
        yield {
            "trait": one[1],
            "other": other[1],
            "seeds": [one[0], other[0]],
            "weights": weights,
            "weights_plain": plain,
        }


def promoted(spaces: Spaces, method: str, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the tokens that each trait's direction changes most, read on prompts, at its scale."""
    chat_model = spaces.chat_model
    ids = tokenized_prompts(chat_model, prompts)
    begins = shared_beginning(ids)
    with progress.silent():
        without = next_tokens(chat_model, ids, begins)
        for trait in spaces.traits:
            with spaces.steerer(method, (trait,)):
                after = next_tokens(chat_model, ids, begins)
            for row in changed_words(chat_model, without, after):
                yield {"trait": trait, **row}


def agreement(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return Spearman's ρ between the cosines of pairs in both spaces, its p-value, and n pairs.

    Of several seeds the means are taken first. Pairs share traits, so that the p-value permutes
    the traits of one space (Mantel 1967), two-sided. ρ and p are None below three traits, and
    where all cosines of a space are equal.
    """
    pairs = grouped(rows, lambda row: (row["trait"], row["other"]))
    traits = sorted({trait for pair in pairs for trait in pair})
    nothing = {"rho": None, "p": None, "n": len(pairs)}
    if len(traits) < 3:
        return nothing
    place = {trait: at for at, trait in enumerate(traits)}
    matrices = np.zeros((2, len(traits), len(traits)))
    for (one, other), own in pairs.items():
        means = [np.mean([row[space] for row in own]) for space in METHODS]
        matrices[:, place[one], place[other]] = matrices[:, place[other], place[one]] = means
    upper = np.triu_indices(len(traits), 1)
    if any(np.ptp(each[upper]) == 0 for each in matrices):
        return nothing

    def rhos(orders: NDArray[np.intp]) -> Array:
        moved = (matrices[1][np.ix_(order, order)][upper] for order in orders)
        return np.array([spearmanr(matrices[0][upper], each).statistic for each in moved])

    p = share_of_orders(lambda orders: np.abs(rhos(orders)), len(traits))
    return {**nothing, "rho": float(rhos(np.arange(len(traits))[None])[0]), "p": p}


def recognition(rows: Sequence[Mapping[str, Any]], layer: int) -> dict[str, Any]:
    """Return of how many diffs the shift at a layer is nearest to the vector of their own trait.

    ``mean`` is the mean cosine with the own vector, over seeds; ``p`` that of its being so large
    had the vectors' names been dealt out by chance, the same for all seeds. ``chance`` is how many
    of the ``n`` would be recognised on the mean by chance.
    """
    at = [row for row in rows if row["layer"] == layer]
    diffs = grouped(at, lambda row: (row["seed"], row["trait"]))
    traits = sorted({row["trait"] for row in at})
    nearest = [max(own, key=lambda row: row["cosine"])["other"] for own in diffs.values()]
    pairs = grouped(at, lambda row: (row["trait"], row["other"]))
    cosines = np.array(
        [[np.mean([r["cosine"] for r in pairs[one, other]]) for other in traits] for one in traits]
    )
    every = np.arange(len(traits))
    return {
        "recognised": sum(name == trait for name, (_, trait) in zip(nearest, diffs, strict=True)),
        "n": len(diffs),
        "chance": len(diffs) / len(traits),
        "mean": float(cosines[every, every].mean()),
        "p": share_of_orders(lambda orders: cosines[every, orders].mean(axis=1), len(traits)),
    }


def linearity(spaces: Spaces, method: str) -> Iterator[dict[str, Any]]:
    """Yield rows of trait, other, residual: how far two at once are from the sum of the two.

    With the shifts s₁, s₂ and s₁₂ of the last layer's mean hidden states, ``residual`` is
    ‖s₁₂ − s₁ − s₂‖ / ‖s₁ + s₂‖ (0: exactly the sum). A trait with itself has twice the coefficient.
    """
    base = spaces.states()[-1]
    alone = {trait: spaces.shift(method, (trait,), base) for trait in spaces.traits}
    for one, other in combinations_with_replacement(spaces.traits, 2):
        expected = alone[one] + alone[other]
        apart = spaces.shift(method, (one, other), base) - expected
        residual = float(apart.norm() / expected.norm())
        yield {"trait": one, "other": other, "residual": residual}


def interference(spaces: Spaces, method: str) -> Iterator[dict[str, Any]]:
    """Yield rows of steered, read: how far steering one trait moves along another.

    Read at the last layer is the shift's coordinate along the other trait's own shift, over the
    length of that: 1 on the diagonal, and elsewhere what comes along unasked.
    """
    base = spaces.states()[-1]
    shifts = {trait: spaces.shift(method, (trait,), base) for trait in spaces.traits}
    for (steered, shift), (read, own) in product(shifts.items(), repeat=2):
        yield {"steered": steered, "read": read, "value": float(shift @ own / own.square().sum())}
