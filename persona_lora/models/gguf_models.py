"""Models in GGUF files: converted once into a safetensors folder of the user's cache.

The folder is named by the file's content: a file that moves is the same model, one that changes is
another. Quantised weights are dequantised and rounded once to bf16; after that a GGUF model is one
like any other.
Knows the file format and what transformers makes of it, and refuses a file of which it would drop
or misread a part; refuses to know what models are for.
"""

from __future__ import annotations

import hashlib
import logging
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader
from platformdirs import user_cache_path
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_folder
from persona_lora.models.loaded_model import check_whole

logger = logging.getLogger(__name__)

SUFFIX = ".gguf"
# What a damaged file makes its readers raise.
DAMAGED = (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, OSError)
INSTEAD = "use the model's original folder or hub id"

# What the file says of the computation, and where transformers' configuration holds it.
SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "vocab_size": "vocab_size",
}
WIDTHS_OF_HEADS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
# How a text is cut before its merges, by the name that the file gives to it.
SPLIT_TEXT = "say 1234 it's"
SPLITS = {
    "gpt-2": ["say", "Ġ1234", "Ġit", "'s"],
    "smollm": ["say", "Ġ1234", "Ġit", "'s"],  # no token of its vocabulary holds two digits
    "qwen2": ["say", "Ġ", "1", "2", "3", "4", "Ġit", "'s"],
    "llama-bpe": ["say", "Ġ", "123", "4", "Ġit", "'s"],
}
ROUND_TRIP = "Tab\there, 3.50 € — naïve;\n\n    two  spaces: 漢字"
ROPE_FACTORS = "rope_freqs.weight"


def models_cache() -> Path:
    """Return the folder that converted models are kept in."""
    return user_cache_path("persona_lora") / "models"


def gguf_folder(file: Path, cache: Path | None = None) -> Path:
    """Return the folder that a GGUF file was converted to, converting it on first use.

    Raises UserError for a file that is damaged, a part of one, an adapter, without a chat
    template, or that transformers cannot read exactly.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; check the path of the model")
    root = cache if cache is not None else models_cache()

    def convert(folder: Path) -> None:
        reader = _open(file)
        _refuse_other_kinds(file, reader)
        logger.warning("converting %s to safetensors, once (into %s)", file, folder)
        convert_gguf(file, folder, reader)

    try:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); check its permissions"
        ) from error
    return converted(root / f"gguf-{content}", convert)


def converted(folder: Path, convert: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, made on first use under a lock: whole or absent."""
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "config.json").is_file():
                convert(folder)
    return folder


def convert_gguf(file: Path, folder: Path, reader: GGUFReader | None = None) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder; UserError where not exact."""
    reader = reader or _open(file)
    model, tokenizer = _read(file)
    fields = _fields(reader)
    _take_rope_factors(file, reader, model.config)
    check_settings(file, fields, model.config)
    _check_size(file, reader, model)
    check_tokenizer(file, str(fields.get("tokenizer.ggml.pre", "")), tokenizer)
    # transformers refuses to save what it takes for a quantised model; the weights are dense now.
    del model.config.quantization_config
    model.hf_quantizer = None
    with atomic_folder(folder) as temporary:
        model.to(_stored_type(reader)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _open(file: Path) -> GGUFReader:
    """Open a file, whose tensors are mapped and not read."""
    try:
        return GGUFReader(file)
    except DAMAGED as error:
        raise UserError(f"{file} is truncated or no GGUF file ({error}); fetch it again") from error


def _fields(reader: GGUFReader) -> dict[str, Any]:
    """Return what the file says of itself, without the lists of its tokens."""
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if name not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    }


def _refuse_other_kinds(file: Path, reader: GGUFReader) -> None:
    fields = _fields(reader)
    kind = fields.get("general.type", "model")
    if kind == "adapter":
        raise UserError(
            f"{file} is a LoRA, not a model; give its base as the model, and the LoRA as the PEFT "
            "adapter that it was made from"
        )
    parts = int(fields.get("split.count", 0))
    if parts > 1 or re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise UserError(
            f"{file} is one part of several; join them with: llama-gguf-split --merge FIRST OUTPUT"
        )
    if kind != "model" or fields.get("general.architecture") in (None, "clip"):
        raise UserError(f"{file} holds no language model (general.type {kind}); {INSTEAD}")
    if "tokenizer.chat_template" not in fields:
        raise UserError(
            f"{file} has no chat template; name the file of an instruct model, or {INSTEAD}"
        )


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_whole refuses them, by name and with shapes
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (*DAMAGED, NotImplementedError, AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot read {file} ({said}); {INSTEAD}") from error
    check_whole(model, info, str(file))
    return model, tokenizer


def check_settings(file: Path, fields: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Raise UserError where the file computes in another way than transformers' configuration."""
    prefix = f"{fields['general.architecture']}."
    for name, stated in fields.items():
        if not name.startswith(prefix) or stated in (None, "none", ""):
            continue
        held = _held(config, name.removeprefix(prefix))
        if isinstance(stated, list):
            stated = max(stated)  # one number a layer, as the models of such files have it
        if not _agree(held, stated):
            raise UserError(
                f"{file} says {name} = {stated}, and transformers reads {held}: the model would "
                f"compute something else; {INSTEAD}"
            )


def _held(config: PretrainedConfig, name: str) -> Any:
    """Return what a configuration holds of a setting; None where it has no place for it."""
    values: dict[str, Any] = config.to_dict()
    rope: Mapping[str, Any] = values.get("rope_parameters") or {}
    if name in WIDTHS_OF_HEADS:
        width = values.get("head_dim")
        return width or values["hidden_size"] // values["num_attention_heads"]
    if name == "rope.freq_base":
        return rope.get("full_attention", rope).get("rope_theta", values.get("rope_theta"))
    return values.get(SETTINGS.get(name, ""))


def _agree(held: Any, stated: Any) -> bool:
    if isinstance(held, (int, float)) and isinstance(stated, (int, float)):
        return abs(held - stated) <= 1e-6 * abs(stated)
    return bool(held == stated)


def _take_rope_factors(file: Path, reader: GGUFReader, config: PretrainedConfig) -> None:
    """Put the scaled frequencies of Llama 3 into the configuration, which transformers leaves out.

    The file holds a divisor for each frequency; raises UserError where they are those of no such
    scaling.
    """
    found = {tensor.name: tensor for tensor in reader.tensors if tensor.name.startswith("rope_")}
    if not found:
        return
    if set(found) == {ROPE_FACTORS}:
        stated = torch.tensor(found[ROPE_FACTORS].data, dtype=torch.float64)
        rope = dict(config.rope_parameters)
        for factor in (8.0, 32.0):  # Llama 3.1 and 3.3, and 3.2
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
            divisors = llama3_divisors(len(stated), rope["rope_theta"], scaling)
            if torch.allclose(divisors, stated, rtol=1e-3):
                config.rope_parameters = {**rope, **scaling}
                return
    raise UserError(
        f"{file} scales its positions by {', '.join(sorted(found))} in a way that is not known "
        f"here; {INSTEAD}"
    )


def llama3_divisors(number: int, theta: float, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Return what Llama 3 divides each of its rotary frequencies by, ``[number]``.

    Wavelengths beyond the old context over ``low_freq_factor`` are stretched by ``factor``, those
    below it over ``high_freq_factor`` are left, and between them the divisor's inverse is linear
    in the number of turns that the old context holds.
    """
    frequencies = theta ** (-torch.arange(number, dtype=torch.float64) / number)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (share + (1 - share) / scaling["factor"])


def _check_size(file: Path, reader: GGUFReader, model: PreTrainedModel) -> None:
    """Raise UserError where the file holds numbers that the model does not, as a bias."""
    stored = sum(
        int(tensor.n_elements) for tensor in reader.tensors if not tensor.name.startswith("rope_")
    )
    if stored != model.num_parameters():
        raise UserError(
            f"{file} holds {stored} numbers and the model made of it {model.num_parameters()}: a "
            f"part would be lost; {INSTEAD}"
        )


def check_tokenizer(file: Path, split: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where a text does not come back, or is cut in another way than it was."""
    before = tokenizer.backend_tokenizer.pre_tokenizer
    if split and split != "default":
        pieces = [] if before is None else [part for part, _ in before.pre_tokenize_str(SPLIT_TEXT)]
        if SPLITS.get(split) != pieces:
            raise UserError(
                f"{file}: its tokenizer cuts text as {split!r}, which is not read exactly here; "
                f"{INSTEAD}"
            )
    ids = tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.lstrip(" ") != ROUND_TRIP:
        raise UserError(f"{file}: its tokenizer makes {back!r} of {ROUND_TRIP!r}; {INSTEAD}")


def _stored_type(reader: GGUFReader) -> torch.dtype:
    """Return the type that holds the weights of a file; quantised ones are rounded to bf16."""
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    exact = {frozenset({"F32"}): torch.float32, frozenset({"F16"}): torch.float16}
    return exact.get(frozenset(types), torch.bfloat16)
