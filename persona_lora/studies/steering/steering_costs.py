"""The two further parts of a comparison, as runs of their own: latency, and the two spaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_lora.core import progress
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Trait
from persona_lora.core.vector_files import load_vector
from persona_lora.models.loading import ChatModel
from persona_lora.steering.bank import Bank, bank_of_diffs, bank_of_vectors
from persona_lora.studies.steering import spaces as study
from persona_lora.studies.steering.calibration import Level, equal_effect_scales
from persona_lora.studies.steering.divergence import load_ordinary_prompts, ordinary_texts
from persona_lora.studies.steering.latency import held_bytes, measure_latency, swap_seconds
from persona_lora.studies.steering.read_latency import VARIANTS

FEW_PROMPTS = 8


def run_latency(
    chat_model: ChatModel,
    trait: Trait,
    bank: Bank,
    levels: Sequence[Level],
    output: Output | Path,
    *,
    batches: Sequence[int] = (1, 8, 32),
    new_tokens: int = 32,
    rounds: int = 5,
    datasets: Path | None = None,
) -> Run:
    """Time all ways of steering at the highest level into the run ``output``; it keeps its rounds.

    Writes ``timings.jsonl`` and ``costs.jsonl`` (seconds of a swap, bytes beside the model).
    """
    highest = max(levels, key=lambda each: each.level).level
    coefficients = {each.method: each.coefficient for each in levels if each.level == highest}
    prompts = load_ordinary_prompts(datasets)
    run = Run.open(
        output,
        command="latency",
        config={
            "trait": trait.name,
            **chat_model.record(),
            "batches": list(batches),
            "new_tokens": new_tokens,
            "rounds": rounds,
        },
        seed=0,
        inputs={
            **chat_model.inputs(),
            **bank.inputs,
            "the instruction": digest_of(trait.instructions[0].pos),
            "the coefficients": digest_of(coefficients),
            "the ordinary prompts": digest_of(prompts),
        },
    )
    with run:
        rows = run.resume_rows("timings")
        per_round = len(VARIANTS) * len(batches)
        kept = len(rows) // per_round
        run.write("timings", rows[: kept * per_round])  # without a round that a kill cut short
        with progress.stage("timing"):
            for found in measure_latency(
                chat_model,
                bank,
                coefficients,
                trait.instructions[0].pos,
                prompts,
                batches=batches,
                new_tokens=new_tokens,
                rounds=rounds,
                first=kept + 1,
            ):
                run.extend("timings", [dataclasses.asdict(each) for each in found])
        if not run.read("costs"):
            seconds = swap_seconds(chat_model, bank)
            held = held_bytes(bank, chat_model)
            rows = [{"what": name, "unit": "s", "value": value} for name, value in seconds.items()]
            rows += [{"what": name, "unit": "bytes", "value": each} for name, each in held.items()]
            run.write("costs", rows)
    return run


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
    prompts = load_ordinary_prompts(datasets)[:FEW_PROMPTS]
    anyway = dataclasses.replace(chat_model, allow_other_base=True)
    weights, activations = bank_of_diffs(diffs), bank_of_vectors(vectors, [layer])
    run = Run.open(
        output,
        command="spaces",
        config={
            **chat_model.record(),
            "traits": sorted(diffs),
            "layer": layer,
            "diff_norms": {trait: diff.norm() for trait, diff in diffs.items()},
        },
        seed=0,
        inputs={
            **chat_model.inputs(),
            **weights.inputs,
            **activations.inputs,
            "the ordinary prompts": digest_of(prompts),
        },
    )

    def kept(name: str, make: Callable[[], Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        if not run.read(name):
            run.write(name, make())
        return run.read(name)

    def scales(bank: Bank) -> dict[str, float]:
        def measured() -> Iterable[Mapping[str, Any]]:
            with progress.stage("equal effect"):
                found = equal_effect_scales(anyway, bank, prompts)
            return map(dataclasses.asdict, found)

        rows = kept(f"scales_{bank.record['kind']}", measured)
        return {row["trait"]: row["coefficient"] for row in rows}

    with run:
        texts = ordinary_texts(chat_model, prompts)
        chosen = study.Spaces(
            diffs,
            vectors,
            layer,
            scales(weights),
            scales(activations),
        )
        kept("shifts", lambda: study.shift_cosines(chat_model, chosen, texts))
        kept(
            "spectra",
            lambda: (
                {"trait": name, **row}
                for name in chosen.traits
                for row in study.spectra(diffs[name])
            ),
        )
        cosines = kept("cosines", lambda: study.trait_cosines(chosen))
        rho, p = study.agreement(cosines)
        kept("agreement", lambda: [{"rho": rho, "p": p, "n": len(cosines)}])
        kept("interference", lambda: study.interference(chat_model, chosen, texts))
        with progress.stage("linearity"):
            kept("linearity", lambda: study.linearity(chat_model, chosen, texts))
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
