"""From the words of a command line to what the library takes; a mistake is a UserError."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_lora.cli.console import console
from persona_lora.cli.environment import environment
from persona_lora.cli.refusals import does_nothing
from persona_lora.cli.shared_options import AdaptedModelOptions, ModelOptions
from persona_lora.core.errors import UserError
from persona_lora.core.settings import split_lists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.core.runs import Output
    from persona_lora.core.steering_vector import SteeringVector
    from persona_lora.judges.choice import JudgeOptions
    from persona_lora.models.load_options import LoadOptions
    from persona_lora.models.loading import ChatModel
    from persona_lora.studies.asking.run import GenerationOptions


def load_model(
    options: ModelOptions,
    directions: Iterable[LoRADiff | SteeringVector] = (),
    *,
    allow_other_base: bool = False,
) -> ChatModel:
    """Load the model that a command was given, with its adapter where it has one.

    A direction that was made with the chat template rendered otherwise is named in a warning.
    """
    from persona_lora.steering.bank import warn_of_other_template

    adapter = options.adapter if isinstance(options, AdaptedModelOptions) else None
    loaded = load_other(options.model, options.alone(), adapter, allow_other_base=allow_other_base)
    warn_of_other_template(loaded, directions)
    return loaded


def load_other(
    name: str,
    options: LoadOptions,
    adapter: Path | None = None,
    *,
    allow_other_base: bool = False,
) -> ChatModel:
    """Load a model by name."""
    from persona_lora.models.loading import load_chat_model

    with console.status(f"loading {name}"):
        return load_chat_model(
            name, adapter=adapter, options=options, allow_other_base=allow_other_base
        )


def steering_method(method: str | None, given: Mapping[str, Any]) -> str:
    """Return the steering method: the one asked for, or the one that the other options imply.

    ``given`` holds, by method, the option that it needs; a method without it, or an option of
    another method, is a UserError.
    """
    implied = [name for name, value in given.items() if value]
    if method is None:
        method = implied[0] if implied else "none"
    if method not in (*given, "none"):
        raise UserError(f"--method must be one of {', '.join(given)} or none, got {method!r}")
    needed = {"lora": "--diff", "activation": "--vector"}
    if method in needed and not given[method]:
        raise UserError(f"--method {method} needs {needed[method]}")
    for other, option in needed.items():
        if other != method and given[other]:
            raise UserError(f"{option} has no part in --method {method}; leave one of them out")
    return method


def load_activation(
    vectors: list[Path],
    coefficients: list[float],
    layers: str | None,
    positions: str,
    ablate: bool,
) -> Any:
    """Load steering vectors with their coefficients, and where they are to act."""
    from persona_lora.core.lora_diff import finite_coefficient
    from persona_lora.core.vector_files import load_vector
    from persona_lora.steering.bank import ActivationSetting

    if coefficients and len(coefficients) != len(vectors):
        raise UserError(
            f"{len(vectors)} --vector and {len(coefficients)} --coefficient; give one for each"
        )
    values = map(finite_coefficient, coefficients or [1.0] * len(vectors))
    loaded = {load_vector(path): value for path, value in zip(vectors, values, strict=True)}
    chosen = layer_numbers(layers, next(iter(loaded)).num_layers)
    return ActivationSetting(loaded, chosen, steering_positions(positions), ablate)


def activation_settings(vectors: list[Path], activation: Any) -> dict[str, Any]:
    """Return what a run records of activation steering; nothing where there is none."""
    if activation is None:
        return {}
    return {
        "vectors": [str(path) for path in vectors],
        "vector_coefficients": list(activation.vectors.values()),
        "layers": list(activation.layers),
        "positions": activation.positions,
    }


def load_population(
    method: str,
    diff: Path | None,
    vector: Path | None,
    coefficients: list[float],
    layers: str | None,
    positions: str,
    control: bool | None,
    seed: int,
) -> Any:
    """Load what a sweep varies; a random control goes beside a vector at a single layer."""
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.core.vector_files import load_vector
    from persona_lora.steering.directions import random_like
    from persona_lora.studies.steering.run import (
        diff_population,
        prompt_population,
        vector_population,
    )

    if method == "lora" and diff is not None:
        return diff_population(LoRADiff.load(diff), coefficients)
    if method != "activation" or vector is None:
        return prompt_population()
    loaded = load_vector(vector)
    chosen = layer_numbers(layers, loaded.num_layers)
    wanted = len(chosen) == 1 if control is None else control
    return vector_population(
        loaded,
        chosen,
        coefficients,
        steering_positions(positions),
        random_like(loaded, seed) if wanted else None,
    )


def steering_positions(positions: str) -> Any:
    """Return the positions; UserError for a word that is none of them."""
    from persona_lora.steering.activations import POSITIONS

    if positions not in POSITIONS:
        raise UserError(f"--positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    return positions


USUAL_DEPTH = 0.55  # of the layers: where published persona vectors steer best


def layer_numbers(text: str | None, num_layers: int) -> tuple[int, ...]:
    """Return decoder layers from text such as "16", "10 20", "0-29" or "0-29:3"."""
    from persona_lora.models.structure import read_layers

    if text is None:
        return (int(USUAL_DEPTH * num_layers),)
    return read_layers(text, num_layers, "--layers")


def load_terms(diffs: list[Path], coefficients: list[float]) -> dict[Any, float]:
    from persona_lora.core.lora_diff import LoRADiff, finite_coefficient

    if coefficients and len(coefficients) != len(diffs):
        raise UserError(
            f"{len(diffs)} --diff and {len(coefficients)} --coefficient; give one for each diff"
        )
    values = coefficients or [1.0] * len(diffs)
    return {
        LoRADiff.load(path): finite_coefficient(value)
        for path, value in zip(diffs, values, strict=True)
    }


def generation_options(
    max_new_tokens: int, temperature: float, samples: int, seed: int, batch_size: str
) -> GenerationOptions:
    from persona_lora.studies.asking.run import GenerationOptions

    if batch_size != "auto" and not batch_size.isdigit():
        raise UserError(f"--batch-size must be a whole number or auto, got {batch_size!r}")
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        seed=seed,
        batch_size="auto" if batch_size == "auto" else int(batch_size),
    )


def judge_options(
    judge: str,
    judge_model: str | None,
    judge_url: str | None,
    judge_mode: str,
    max_judge_cost: float | None,
    seed: int,
) -> JudgeOptions:
    from platformdirs import user_cache_path

    from persona_lora.judges.choice import JudgeOptions

    if judge_mode not in ("logprobs", "number"):
        raise UserError(f"--judge-mode must be logprobs or number, got {judge_mode!r}")
    idle = {
        "judge_url": ("openai" not in judge and judge_url is not None),
        "judge_mode": ("openai" not in judge and judge_mode != "logprobs"),
        "max_judge_cost": ("openai" not in judge and max_judge_cost is not None),
        "judge_model": (judge.strip() == "embedding" and judge_model is not None),
    }
    for name, is_idle in idle.items():
        if is_idle:
            raise does_nothing(name, f"with --judge {judge}")
    return JudgeOptions(
        judge=judge,
        judge_model=judge_model,
        judge_url=judge_url,
        judge_mode="number" if judge_mode == "number" else "logprobs",
        max_judge_cost=max_judge_cost,
        cache=user_cache_path("persona_lora") / "verdicts.sqlite",
        environ=environment(),
        seed=seed,
    )


def judge_settings(options: JudgeOptions) -> dict[str, Any]:
    """What a run records of its judge: everything but the key."""
    return {
        "judge": options.judge,
        "model": options.judge_model or options.environ.get("JUDGE_MODEL") or None,
        "mode": options.judge_mode,
    }


def judge_inputs(options: JudgeOptions) -> dict[str, str]:
    from persona_lora.judges import choice

    return choice.judge_inputs(options)


def judged_output(
    path: Path, overwrite: bool, judging: JudgeOptions, config: Mapping[str, Any] | None = None
) -> Output:
    """Return where a run is written that records who judges it."""
    from persona_lora.core.runs import Output

    record = {**(config or {}), "judge": judge_settings(judging)}
    return Output(path, overwrite, record, judge_inputs(judging))


def judge_factory(trait: Any, chat_model: ChatModel, options: JudgeOptions) -> Callable[[], Any]:
    from persona_lora.judges.choice import check_judge, make_judge

    check_judge(trait, chat_model, options)
    return lambda: make_judge(trait, chat_model, options)


def question_split(split: str) -> Any:
    from persona_lora.core.traits import SPLITS

    if split not in SPLITS:
        raise UserError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split


def numbers(text: str) -> list[float]:
    from persona_lora.core.lora_diff import finite_coefficient

    words = text.replace(",", " ").split()
    try:
        return [finite_coefficient(float(word)) for word in words]
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'--coefficients must be numbers, as in "-1 0 1", got {text!r}') from error


def listed(
    texts: Sequence[str], option: str, *, whole: Callable[[str], bool] = os.path.exists
) -> list[str]:
    """Return the parts of an option that may be repeated, or hold a list; UserError for none."""
    parts = split_lists(texts, whole)
    if not parts:
        raise UserError(f"{option} is empty; name at least one")
    return parts
