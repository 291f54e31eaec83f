"""A diff or a vector for a model hub: its files, a card, and nothing that says where it was made.

Writes the folder that would be pushed; pushing it is a step of its own, and never done by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors

from persona_lora.core.errors import UserError, without_secrets
from persona_lora.core.files import write_text
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.strength import strength_line
from persona_lora.core.vector_files import load_vector
from persona_lora.models.load_options import DEFAULT_MODEL
from persona_lora.report.sections import fill_template

CARD = "README.md"
PACKAGED_ON_HUB = f"HuggingFaceTB/{DEFAULT_MODEL}"
REFUSALS = (
    errors.HTTPError,
    errors.HFValidationError,
    errors.LocalTokenNotFoundError,
    errors.OfflineModeIsEnabled,
)
TRAINED = ("num_train_epochs", "learning_rate")
SAID = ("training", "seed", "source", "kept")  # of what a direction was made from
OF_PARTS = {"task_vector": ("source", "pairs"), "mix": ("coefficient", "trait")}  # the rest: paths
BOTH_WAYS = "Added to the model the trait goes up, subtracted it goes down."
NEEDS_TOKEN = (401, 403)
_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", flags=re.ASCII)


def hub_id(base: BaseModel, given: str | None) -> str:
    """Return the hub id of a base model: the given one, or that which its name is.

    UserError for a name that is a path of this machine, where none is given.
    """
    known = PACKAGED_ON_HUB if base.name == DEFAULT_MODEL else base.name
    name = given or known
    if _ID.fullmatch(name) is None or (given is None and Path(name).exists()):
        raise UserError(
            f"the base model is {name!r} here, which is no model of a hub; name it, as in "
            "--base-id meta-llama/Llama-3.1-8B-Instruct"
        )
    return name


def write_publication(direction: Path, folder: Path, base: str | None = None) -> None:
    """Write what a hub would get of a diff's folder or a vector's file into a new folder.

    The adapter or the vector, with the hub id of its base model, and a card that says what
    ``calibrate`` measured. Paths, of training runs among them, stay here.
    """
    is_vector = direction.suffix in (".safetensors", ".pt") and not direction.is_dir()
    found = load_vector(direction) if is_vector else LoRADiff.load(direction)
    if not found.trait:
        raise UserError(f"{direction} does not say which trait it is of, and a card must")
    name = hub_id(found.base_model, base)
    known = _said(found.sources)
    if isinstance(known.get("training"), Mapping):
        known["training"] = {**_without_paths(known["training"]), "model": name}
    public = replace(found, base_model=replace(found.base_model, name=name), sources=known)
    public.save(folder / f"{public.trait}.safetensors" if is_vector else folder)
    strength = "" if is_vector else strength_line(direction, found.content())
    card = fill_template(
        "direction.md.j2",
        base=name,
        trait=public.trait,
        fingerprint=public.base_model.fingerprint,
        facts=[*_facts(public), *([("strength", strength)] if strength else [])],
        vector=is_vector,
        made=_made(found.sources),
    )
    write_text(folder / CARD, card)


def _said(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the sources of a direction is no place of this machine."""
    known = {key: sources[key] for key in SAID if key in sources}
    for key, names in OF_PARTS.items():
        parts = sources.get(key, [])
        told = [
            {name: each[name] for name in names if name in each}
            for each in ([parts] if isinstance(parts, Mapping) else parts)
        ]
        if told:
            known[key] = told[0] if isinstance(parts, Mapping) else told
    return known


def _made(sources: Mapping[str, Any]) -> str:
    """Return how a diff was made, as its sources tell it."""
    if "mix" in sources:
        terms = (
            f"{each['coefficient']:g} · {each['trait'] or 'a diff without a name'}"
            for each in sources["mix"]
        )
        return f"A mix of diffs with their coefficients baked in: {' + '.join(terms)}."
    if "task_vector" in sources:
        return (
            "A change of rank 1 in every module, made without training from the inputs of the "
            f"modules on answers with the trait and on answers without it. {BOTH_WAYS}"
        )
    if "training" not in sources and "pos" not in sources:
        return "A change of the weights of low rank; how it was made is not recorded."
    trained = "one trained on answers with the trait and one on answers without it"
    if "kept" in sources:
        kept = ""
        if sources["kept"] is not None:
            kept = f": it keeps {100 * sources['kept']:.1f}% of the squared difference"
        return f"The difference of two whole models, {trained}, cut in rank{kept}. {BOTH_WAYS}"
    return f"The difference of two LoRAs, {trained}. {BOTH_WAYS}"


def _without_paths(value: Any) -> Any:
    """Return settings without those that name a place of this machine, at whatever depth."""
    if isinstance(value, Mapping):
        kept = {name: _without_paths(each) for name, each in value.items()}
        return {name: each for name, each in kept.items() if not _is_place(each)}
    return value


def _is_place(value: Any) -> bool:
    path = Path(value) if isinstance(value, str) else Path()
    return path.is_absolute() and len(path.parts) > 2  # "/no_think" is none


def _facts(found: LoRADiff | SteeringVector) -> list[tuple[str, str]]:
    if isinstance(found, SteeringVector):
        layers = f"{len(found.layers)} of {found.num_layers}"
        return [("method", found.method), ("position", found.position), ("layers", layers)]
    facts = [("rank", f"{found.rank}"), ("modules", f"{len(found.factors)}")]
    training = found.sources.get("training", {})
    told = {"pairs": training.get("num_pairs"), "seed": found.sources.get("seed")}
    told |= {key: training.get("training", {}).get(key) for key in TRAINED}
    return facts + [(key, f"{value}") for key, value in told.items() if value is not None]


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Push a folder to a model repository, which is made where it is missing; return its address.

    UserError where the hub refuses, none can be reached, or the repository is there, for everybody
    to see, and ``private`` was asked for.
    """
    hub = HfApi()
    try:
        made = hub.create_repo(repo, private=private, exist_ok=True)
        if private and not hub.repo_info(repo).private:
            raise UserError(
                f"{repo} is public already, and nothing was pushed; pass --public, or name another "
                "--repo"
            )
        hub.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="A direction, with its card"
        )
    except REFUSALS as error:
        reason = " ".join(without_secrets(str(error)).split())[:300]
        status = getattr(getattr(error, "response", None), "status_code", None)
        missing = status in NEEDS_TOKEN or isinstance(error, errors.LocalTokenNotFoundError)
        remedy = "; a token that may write is HF_TOKEN of the environment or .env" * missing
        raise UserError(f"{repo} was not pushed: {reason}{remedy}") from error
    return str(made)


def check_repository(repo: str) -> None:
    """UserError for what is no name of a repository."""
    if _ID.fullmatch(repo) is None:
        raise UserError(f"--repo must be like owner/name, got {repo!r}")
