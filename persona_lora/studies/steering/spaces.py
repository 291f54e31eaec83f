"""Do the two spaces agree? What a weight difference does to activations; how traits meet in both.

For every trait a LoRA difference L and a steering vector v: does adding c·L to the weights move the
hidden states along v? Do traits that are near in one space stand near in the other? Is the effect
of two differences at once the sum of their effects?
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, layer_number, mix
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.vector_files import load_vector
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange
from persona_lora.models.loading import ChatModel
from persona_lora.projections.inputs import ModuleInputs, kept_inputs, load_ordinary_prompts
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.bank import Bank, bank_of_diffs, bank_of_vectors, steer_live
from persona_lora.steering.placement import check_base_model
from persona_lora.steering.steerer import Steerer, Together, Unsteered
from persona_lora.studies.asking.run import open_run
from persona_lora.studies.steering.calibration import equal_effect_scales
from persona_lora.studies.steering.divergence import ordinary_texts

RESPONSE = "response_avg"
EXACT_TRAITS = 7
DRAWN_ORDERS = 5000
TIES = 1e-9
FEW_PROMPTS = 8
Rows = Iterable[Mapping[str, Any]]


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
            raise UserError("spaces need a diff and a vector of the same traits, two at least")

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
        return self.states(self._steerer(method, traits))[-1] - base

    def _steerer(self, method: str, traits: Sequence[str]) -> Steerer:
        chat_model = self.chat_model
        if method == "weights":
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


def check_directions(
    chat_model: ChatModel, diffs: Mapping[str, LoRADiff], vectors: Mapping[str, SteeringVector]
) -> None:
    """Raise UserError when a trait's diff or vector was made for a model of other weights."""
    made: list[LoRADiff | SteeringVector] = [*diffs.values(), *vectors.values()]
    check_base_model(chat_model.model, made, allow_other_base=chat_model.allow_other_base)


def run_spaces(
    chat_model: ChatModel,
    diffs: Mapping[str, LoRADiff],
    vectors: Mapping[str, SteeringVector],
    layer: int,
    output: Output | Path,
    *,
    datasets: Path | None = None,
) -> Run:
    """Compare the two spaces over several traits into the run ``output``; parts there are kept.

    All directions are brought to equal effect first. Writes ``scales_*``, ``shifts``, ``spectra``,
    ``cosines``, ``agreement``, ``interference`` and ``linearity``.
    """
    check_directions(chat_model, diffs, vectors)
    ordinary = load_ordinary_prompts(datasets)
    prompts = ordinary[:FEW_PROMPTS]
    weights, activations = bank_of_diffs(diffs), bank_of_vectors(vectors, [layer])
    config = {
        "traits": sorted(diffs),
        "layer": layer,
        "diff_norms": {trait: diff.norm() for trait, diff in diffs.items()},
    }
    read = (weights.inputs, activations.inputs, {"the ordinary prompts": digest_of(prompts)})
    run = open_run(output, "spaces", chat_model, config, *read)

    def kept(name: str, make: Callable[[], Rows]) -> list[dict[str, Any]]:
        """Return the rows of a part; those that are not there are made, and written."""
        if not run.read(name):
            run.write(name, make())
        return run.read(name)

    def scales(bank: Bank) -> dict[str, float]:
        def measured() -> Rows:
            with progress.stage("equal effect"):
                found = equal_effect_scales(chat_model, bank, prompts)
            return map(dataclasses.asdict, found)

        rows = kept(f"scales_{bank.record['kind']}", measured)
        return {row["trait"]: row["coefficient"] for row in rows}

    with run:
        texts, found = ordinary_texts(chat_model, prompts), (scales(weights), scales(activations))
        spaces = Spaces(chat_model, texts, diffs, vectors, layer, *found)
        inputs = kept_inputs(chat_model, ordinary)
        kept("shifts", lambda: shift_cosines(spaces))
        kept(
            "spectra", lambda: (row for name in spaces.traits for row in spectra(diffs[name], name))
        )
        cosines = kept("cosines", lambda: trait_cosines(spaces, inputs))
        rho, p = agreement(cosines)
        kept("agreement", lambda: [{"rho": rho, "p": p, "n": len(cosines)}])
        kept("interference", lambda: interference(spaces))
        with progress.stage("linearity"):
            kept("linearity", lambda: linearity(spaces))
    return run


def trait_directions(
    traits: Sequence[str], folder: Path
) -> tuple[dict[str, LoRADiff], dict[str, SteeringVector]]:
    """Load every trait's ``{trait}/diff`` and mean-difference vector; UserError if one is not."""
    diffs, vectors = {}, {}
    for trait in traits:
        diff = folder / trait / "diff"
        vector = folder / "vectors" / trait / f"{trait}_response_avg.safetensors"
        for path in (diff, vector):
            if not path.exists():
                raise UserError(
                    f"{path} does not exist; make it with: bash scripts/compare_steering.sh {trait}"
                )
        diffs[trait], vectors[trait] = LoRADiff.load(diff), load_vector(vector)
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


def spectra(diff: LoRADiff, trait: str) -> list[dict[str, Any]]:
    """Return layer, kind, norm, top share of ‖·‖² and effective rank of every module changed.

    The effective rank is exp of the entropy of the shares σᵢ² / Σσ² (Roy and Vetterli 2007).
    """
    rows = []
    for name, factors in diff.factors.items():
        core = torch.linalg.qr(factors.B.double()).R @ torch.linalg.qr(factors.A.double().T).R.T
        squares = torch.linalg.svdvals(core).square()
        total = float(squares.sum())
        if total == 0:
            continue
        shares = (squares / total)[squares > 0]
        rows.append(
            {
                "trait": trait,
                "module": name,
                "layer": layer_number(name),
                "kind": name.rsplit(".", 1)[-1],
                "norm": math.sqrt(total),
                "top_share": float(shares.max()),
                "effective_rank": math.exp(-float((shares * shares.log()).sum())),
                "rank": factors.rank,
            }
        )
    return rows


def trait_cosines(spaces: Spaces, inputs: ModuleInputs) -> list[dict[str, Any]]:
    """Return one row per pair of traits: the cosine of diffs, and of vectors at the layer.

    That of diffs is weighted by ``inputs``; ``weights_plain`` is not.
    """
    other_base = spaces.chat_model.allow_other_base
    weighed = {
        trait: inputs.weigh(diff, allow_other_base=other_base)
        for trait, diff in spaces.diffs.items()
    }
    return [
        {
            "trait": one,
            "other": other,
            "weights": weighed[one].cosine(weighed[other]),
            "weights_plain": spaces.diffs[one].cosine(spaces.diffs[other]),
            "activations": spaces.vectors[one].cosine(spaces.vectors[other])[spaces.layer],
        }
        for one, other in combinations(spaces.traits, 2)
    ]


def agreement(
    rows: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """Return Spearman's ρ between the cosines of pairs in both spaces, and its p-value.

    Pairs share traits, so that the p-value permutes the traits of one space (Mantel 1967),
    two-sided: over all orders of up to seven traits, over 5000 random ones of more. None, None
    below three traits, and where all cosines of a space are equal.
    """
    traits = sorted({row[end] for row in rows for end in ("trait", "other")})
    if len(traits) < 3:
        return None, None
    place = {trait: at for at, trait in enumerate(traits)}
    matrices = np.zeros((2, len(traits), len(traits)))
    for row in rows:
        one, other = place[row["trait"]], place[row["other"]]
        matrices[:, one, other] = matrices[:, other, one] = row["weights"], row["activations"]
    upper = np.triu_indices(len(traits), 1)

    def rho(order: Sequence[int]) -> float:
        moved = matrices[1][np.ix_(order, order)]
        return float(spearmanr(matrices[0][upper], moved[upper]).statistic)

    if any(np.ptp(each[upper]) == 0 for each in matrices):
        return None, None
    found = rho(range(len(traits)))
    if len(traits) <= EXACT_TRAITS:
        orders = list(permutations(range(len(traits))))  # the true order is one of them
        return found, float(np.mean([abs(rho(order)) >= abs(found) - TIES for order in orders]))
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(len(traits)).tolist() for _ in range(DRAWN_ORDERS)]
    as_far = sum(abs(rho(order)) >= abs(found) - TIES for order in drawn)
    return found, (1 + as_far) / (1 + len(drawn))


def linearity(spaces: Spaces) -> list[dict[str, Any]]:
    """Return rows of method, trait, other: how far two at once are from the sum of the two.

    With the shifts s₁, s₂ and s₁₂ of the last layer's mean hidden states, ``residual`` is
    ‖s₁₂ − s₁ − s₂‖ / ‖s₁ + s₂‖ (0: exactly the sum). A trait with itself has twice the coefficient.
    """
    base = spaces.states()[-1]
    pairs = [*combinations_with_replacement(spaces.traits, 2)]
    rows = []
    for number, method in enumerate(("weights", "activations")):
        alone = {trait: spaces.shift(method, (trait,), base) for trait in spaces.traits}
        for done, (one, other) in enumerate(pairs):
            expected = alone[one] + alone[other]
            apart = spaces.shift(method, (one, other), base) - expected
            residual = float(apart.norm() / expected.norm())
            rows.append({"method": method, "trait": one, "other": other, "residual": residual})
            progress.report(number * len(pairs) + done + 1, 2 * len(pairs))
    return rows


def interference(spaces: Spaces) -> list[dict[str, Any]]:
    """Return rows of method, steered, read: how far steering one trait moves along another.

    Read at the last layer is the shift's coordinate along the other trait's own shift, over the
    length of that: 1 on the diagonal, and elsewhere what comes along unasked.
    """
    base = spaces.states()[-1]
    rows = []
    for method in ("weights", "activations"):
        shifts = {trait: spaces.shift(method, (trait,), base) for trait in spaces.traits}
        for (steered, shift), (read, own) in product(shifts.items(), repeat=2):
            value = float(shift @ own / own.square().sum())
            rows.append({"method": method, "steered": steered, "read": read, "value": value})
    return rows
