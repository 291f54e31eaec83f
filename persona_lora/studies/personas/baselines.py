"""Where the directions of each way of steering a persona come from: a function each, in one table.

Knows names and folders; refuses to know how mixes of the directions are searched and judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.lora_diff import By, LoRADiff, part_of, parts_of
from persona_lora.core.resources import READY, ready_diff
from persona_lora.core.vector_files import load_vector
from persona_lora.projections.inputs import ModuleInputs
from persona_lora.steering.bank import Bank, bank_of_diffs, bank_of_vectors
from persona_lora.steering.directions import EXTRACTORS
from persona_lora.studies.read_seeds import seeds_of_traits

LORA, RANDOM, TPE = "lora", "random", "tpe"
SEARCHED_BY = {RANDOM: "random", TPE: "tpe"}  # methods of a comparison, over LoRA differences
EQUAL, LIKELIEST = "equal", "likelihood"
UNSEARCHED = (EQUAL, LIKELIEST)  # mixes of LoRA differences, too
NEIGHBOURS = 1


@dataclass(frozen=True)
class Wanted:
    """What directions are asked for: one per trait, from what lies below ``folder``.

    ``layers`` are those that vectors act at; ``energy`` is the share of the squared norm that the
    rank of diffs is cut to, None for all of it, and ``inputs`` are what weighs that norm, None for
    the Frobenius norm; ``trained`` names their training seed ("seed0"), where there are several.
    ``by`` cuts every diff into bands of layers, or into what it changes in each kind of block, as
    directions of their own: "evil@0-9", "evil@mlp". Traits may be such too.
    """

    traits: Sequence[str]
    folder: Path
    layers: Sequence[int] = ()
    energy: float | None = None
    trained: str = ""
    by: By = "trait"
    inputs: ModuleInputs | None = None


def lora_diffs(wanted: Wanted) -> Bank:
    """Load ``{folder}/{trait}/diff`` of every trait, or the diff of one training seed."""
    diffs = {}
    for name in wanted.traits:
        trait, _, part = name.partition("@")
        whole = LoRADiff.load(found(wanted.folder / trait / wanted.trained / "diff", trait))
        for own in [part] if part else parts_of(whole, wanted.by):
            diffs[f"{trait}@{own}" if own else trait] = part_of(whole, own) if own else whole
    if wanted.energy is None:
        return bank_of_diffs(diffs)
    return cut_bank(diffs, wanted.energy, wanted.inputs)


def cut_bank(diffs: Mapping[str, LoRADiff], energy: float, inputs: ModuleInputs | None) -> Bank:
    """Return a bank of diffs whose ranks keep the share ``energy`` of ‖·‖², weighed by ``inputs``.

    Whether they are of the model whose inputs these are is asked where they steer.
    """
    if inputs is None:
        plain = {trait: diff.compress(energy=energy).diff for trait, diff in diffs.items()}
        return bank_of_diffs(plain, cut={"energy": energy})
    weighed = {
        trait: inputs.compress(diff, energy=energy, allow_other_base=True).diff
        for trait, diff in diffs.items()
    }
    return bank_of_diffs(weighed, cut={"energy": energy, "weighed_by": inputs.prompts})


def trainings(method: str, folder: Path, traits: Sequence[str]) -> tuple[str, ...]:
    """Return the training seeds of a method's directions, ("",) of those that have none."""
    return seeds_of_traits(folder, traits) if method == LORA else ("",)


def extracted_vectors(method: str, wanted: Wanted) -> Bank:
    """Load the vectors of a method of extraction, below ``{folder}/vectors/{trait}``."""
    suffix = "" if method == "mean_diff" else f"_{method}"
    paths = {
        trait: wanted.folder / "vectors" / trait / f"{trait}_response_avg{suffix}.safetensors"
        for trait in wanted.traits
    }
    vectors = {trait: load_vector(found(path, trait)) for trait, path in paths.items()}
    return bank_of_vectors(vectors, wanted.layers)


def found(path: Path, trait: str) -> Path:
    """Return the path of a trained direction; raises UserError where it is not there."""
    if not path.exists():
        ready = ready_diff(path)
        instead = f"{ready}, or --trait-vector-dir {READY}" if ready else ""
        raise UserError(
            f"{path} does not exist; make it with: "
            f"TRAITS={trait} bash scripts/train_style_traits.sh{instead}"
        )
    return path


# What is not extracted from pairs; a further way to give a person's voice is one more line.
BASELINES: dict[str, Callable[[Wanted], Bank]] = {LORA: lora_diffs}


def sources() -> dict[str, Callable[[Wanted], Bank]]:
    """Return every source of directions by name: those above, and vectors by each extractor."""
    return {**BASELINES, **{name: partial(extracted_vectors, name) for name in EXTRACTORS}}


def check_method(method: str) -> None:
    """UserError for a method that has no source of directions."""
    known = sources()
    if method not in known:
        raise UserError(f"no method {method!r}; {nearest_names(method, known)}")


def load_directions(method: str, wanted: Wanted) -> Bank:
    """Load one direction per trait.

    Raises UserError for an unknown method, a direction that is not there, and an ``energy`` for
    anything but LoRA differences.
    """
    check_method(method)
    if wanted.energy is not None and method != LORA:
        raise UserError(f"energy cuts the rank of LoRA differences; {method!r} has none")
    return sources()[method](wanted)


def directions_of(method: str) -> str:
    """Return whose directions a method of a comparison uses: "svd@20" those of "svd"."""
    name = method.partition("@")[0]
    return LORA if name in (*SEARCHED_BY, *UNSEARCHED) else name


def default_layers(model_layers: int) -> tuple[int, ...]:
    """Return three layers around two thirds of the depth."""
    middle = min(round(2 / 3 * model_layers), model_layers - 1)
    lowest, highest = max(0, middle - NEIGHBOURS), min(model_layers - 1, middle + NEIGHBOURS)
    return tuple(range(lowest, highest + 1))
