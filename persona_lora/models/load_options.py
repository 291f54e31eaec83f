"""How a model is loaded: the options that every command and every training run shares.

One name each, whoever asks. Knows options and what contradicts itself; refuses to know how they
are carried out (``loading``). Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from persona_lora.core.errors import UserError
from persona_lora.core.json_text import parse_json

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
QUANTISATIONS = ("4bit", "8bit")
# What a chat template is given by whoever renders it.
RENDERERS_OWN = ("messages", "tools", "documents", "add_generation_prompt")


def option(default: Any, text: str) -> Any:
    """Return a field with its default, and what ``--help`` says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LoadOptions:
    """What decides how a model's weights are held and how its chat template is rendered.

    ``chat_template_args`` is a mapping or its JSON text; it is kept as JSON text with sorted keys,
    so that equal options are equal values. Raises UserError for a value that is none of those
    known.
    """

    dtype: str = option(
        "auto",
        "Type of the weights: auto (bf16 where the hardware computes in it), float32, "
        "bfloat16 or float16.",
    )
    device_map: str | None = option(None, "transformers' device map: cpu, cuda, auto …")
    revision: str | None = option(None, "A branch, tag or commit of a model on the hub.")
    quantize: str | None = option(None, "4bit or 8bit weights, by bitsandbytes.")
    attn_implementation: str | None = option(
        None, "transformers' attention: eager, sdpa, flash_attention_2 …"
    )
    trust_remote_code: bool = option(False, "Run code that comes with a model; never otherwise.")
    chat_template_args: dict[str, Any] | str | None = option(
        None, "JSON for the chat template, as in '{\"enable_thinking\": false}'."
    )

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise UserError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")
        if self.quantize is not None and self.quantize not in QUANTISATIONS:
            raise UserError(
                f"quantize must be one of {', '.join(QUANTISATIONS)}, got {self.quantize!r}"
            )
        for name in ("device_map", "revision", "attn_implementation"):
            if getattr(self, name) == "":
                raise UserError(f"{name} is empty; leave it out, or give it a value")
        object.__setattr__(self, "chat_template_args", _canonical(self.chat_template_args))

    @property
    def template_args(self) -> dict[str, Any]:
        """The arguments of the chat template as a mapping; empty where there are none."""
        args = self.chat_template_args
        return {} if args is None else dict(json.loads(str(args)))

    def changed(self, *, dtype: str | None = None, device_map: str | None = None) -> LoadOptions:
        """Return these options with another type or place of the weights, where one is given."""
        return replace(self, dtype=dtype or self.dtype, device_map=device_map or self.device_map)

    def alone(self) -> LoadOptions:
        """Return only these options, of an object of a class that adds others."""
        return LoadOptions(**{each.name: getattr(self, each.name) for each in fields(LoadOptions)})

    def elsewhere(self) -> Self:
        """Return the options for another model than the one they name a revision of."""
        return replace(self, revision=None)

    def record(self) -> dict[str, Any]:
        """Return what a run records of these options: those that are set and change numbers.

        The place (``device_map``) is not among them; the type is that of the loaded weights, and
        recorded with them.
        """
        left_out = ("dtype", "device_map")
        found = {
            each.name: getattr(self, each.name)
            for each in fields(LoadOptions)
            if each.name not in left_out and getattr(self, each.name) != each.default
        }
        return {**found, "chat_template_args": self.template_args} if self.template_args else found


def _canonical(given: Any) -> str | None:
    """Return the JSON text of template arguments; None where there are none."""
    value = given
    if isinstance(given, str):
        name = "chat_template_args (as in '{\"enable_thinking\": false}')"
        value = parse_json(given, name) if given.strip() else {}
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"chat_template_args must be a mapping, got {given!r}")
    own = sorted(set(value) & set(RENDERERS_OWN))
    if own:
        raise UserError(f"chat_template_args cannot set {own[0]!r}: it is given to every template")
    return json.dumps(dict(value), sort_keys=True) if value else None
