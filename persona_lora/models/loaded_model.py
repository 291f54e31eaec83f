"""What was loaded: is it whole, is it of a known shape, and which model is it?

transformers and PEFT fill gaps with random numbers and go on. Models are known by what they do, not
by their names: a text decoder with numbered blocks, each of which runs once and in order and hands
on hidden states of one width. docs/models.md has the table of families that were tried, and how to
try another. Refuses to know where a model came from."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_lora.core.adapter_config import alpha_of, lists
from persona_lora.core.adapter_files import adapter_config, read_factors
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, few_names
from persona_lora.core.lora_diff import layer_number
from persona_lora.core.tensor_files import tensor_digest
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.structure import canonical_name, hidden_size, linear_modules, text_decoder

logger = logging.getLogger(__name__)

# Computed from the configuration; older releases saved them beside the weights.
BUFFERS = re.compile(r"\.(inv_freq|attn\.bias|attention\.bias|masked_bias)$")


def check_whole(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Raise UserError where a loaded model is not what its checkpoint holds.

    ``info`` is the loading info of transformers. A weight that the checkpoint lacks would be
    random; one for which the model's modules have no place (a bias, an unmerged LoRA, a further
    layer) would be dropped. A part that the model has not (a value head) is named in a warning.
    """
    mismatched = {key: shapes for key, *shapes in info["mismatched_keys"]}
    if mismatched:
        key, (stored, expected) = min(mismatched.items())
        raise UserError(
            f"{name}: {key} is {list(stored)}, and {list(expected)} by its config.json "
            f"({len(mismatched)} such weights); mend the configuration or save the model again"
        )
    missing = sorted(info["missing_keys"])
    unused = sorted(key for key in info["unexpected_keys"] if not BUFFERS.search(key))
    if missing:
        holds = f"; it holds {few_names(unused)} instead" if unused else ""
        raise UserError(
            f"{name} lacks {few_names(missing)}, which would be random numbers{holds}; save the "
            "whole model again with save_pretrained, under the names that it loads by"
        )
    modules = dict(model.named_modules())
    inside = [key for key in unused if _has_owner(key, modules)]
    if inside:
        raise UserError(
            f"{name} holds {few_names(inside)}, for which the model of its config.json has no "
            "place; mend the configuration, or merge what was added before saving"
        )
    if unused:
        logger.warning("%s: %s left out, the model has no such part", name, few_names(unused))


def peft_config(adapter: Path) -> LoraConfig:
    """Return a configuration that puts on the modules of an adapter's file, each by its name.

    Its own may hold patterns that PEFT would match without end, or that leave modules out.
    """
    config = adapter_config(adapter)
    factors = read_factors(adapter, on_disk=True).factors
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    alphas = {name: alpha_of(config, name) for name in ranks}
    rank, alpha = max(ranks.values()), max(alphas.values())
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config["base_model_name_or_path"],
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        use_rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        target_modules=list(ranks),
        rank_pattern={re.escape(name): each for name, each in ranks.items() if each != rank},
        alpha_pattern={re.escape(name): each for name, each in alphas.items() if each != alpha},
    )


def check_adapter_whole(model: nn.Module, adapter: Path) -> None:
    """Raise UserError where PEFT did not put exactly the factors of an adapter's file on a model.

    A module whose names it does not recognise keeps a random A and a B of zeros.
    """
    factors = read_factors(adapter, on_disk=True).factors
    wrapped = {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    config = adapter_config(adapter)
    lacking = {name for name in linear_modules(model) if lists(config, name) is True}
    strange = sorted(factors.keys() ^ wrapped.keys() | lacking - factors.keys())
    differing = [
        name
        for name in sorted(factors.keys() & wrapped.keys())
        if not _holds(wrapped[name], factors[name][0])
    ]
    if strange or differing:
        raise UserError(
            f"{adapter}: PEFT does not put {few_names(strange or differing)} on this model as the "
            "file holds it; the adapter belongs to another model, or was saved under other names"
        )


def _holds(module: Any, A: Tensor) -> bool:
    """Tell whether a PEFT layer has this A; one that lies elsewhere (offloaded) is not asked."""
    weight = module.lora_A["default"].weight
    return weight.is_meta or torch.equal(weight.detach().cpu(), A.to(weight.dtype))


def _has_owner(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Tell whether a weight lies below a module of the model, other than in its outermost ones."""
    owner = key
    while owner and owner not in modules:
        owner = owner.rpartition(".")[0]
    return "." in owner or (bool(owner) and not any(True for _ in modules[owner].children()))


PROBE = "a b c"
ROWS = 2
LEAST_ROUNDING = 0.01  # of the spread of logits: more than fp32 and TF32 round


@torch.inference_mode()
def check_support(model: PreTrainedModel, tokens: list[int], name: str) -> None:
    """Run ``tokens`` through the model, beside a row that differs from them in the last one.

    Raises UserError where anything is not as expected.

    The message says what was found. Numbers that are not finite are refused too: an answer made of
    them would look like one.
    """
    decoder = text_decoder(model)
    if layer_number(f"{decoder.blocks_name}.0.") != 0:
        raise _unknown(name, f"its blocks are called {decoder.blocks_name}.N")
    expected = (ROWS, len(tokens), hidden_size(model))
    seen: list[int] = []

    def note(number: int, module: nn.Module, arguments: object, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if not isinstance(states, Tensor) or tuple(states.shape) != expected:
            raise _unknown(name, f"block {number} gives no hidden states of shape {expected}")
        seen.append(number)

    hooks = [
        Hook(block, partial(note, number), f"block {number}")
        for number, block in enumerate(decoder.blocks)
    ]
    with Hooked(hooks):
        device = model.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded: accelerate brings the weights in, and the tokens
            device = torch.device("cpu")
        ids = torch.tensor([tokens, [*tokens[:-1], tokens[0]]], device=device)
        versions = _versions(model)
        try:
            logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        except (UserError, MemoryError, OSError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model's own code may raise anything
            if "memory" in str(error):
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{name} cannot read three tokens: {type(model).__name__} fails with {said}; "
                "mend its config.json, or load it with another release of transformers"
            ) from error
    if seen != list(range(len(decoder.blocks))):
        raise _unknown(name, f"its {len(decoder.blocks)} blocks ran {len(seen)} times")
    if not bool(torch.isfinite(logits).all()):
        raise UserError(
            f"{name} gives NaN or infinity for three tokens; load it in float32 or bfloat16, or "
            "fetch its weights again"
        )
    rounding = max(LEAST_ROUNDING, 6 * torch.finfo(logits.dtype).eps)
    before = logits[:, :-1].float()
    if bool((before[0] - before[1]).abs().mean() > rounding * before.std()):
        raise _unknown(name, "what it says at a token depends on tokens behind it or on other rows")
    if _versions(model) != versions:
        raise _unknown(name, "it changes its weights while it runs")


def _versions(model: nn.Module) -> list[int]:
    """Return how often each weight was written to; offloaded ones come and go and count nothing."""
    counted = (each for each in model.parameters() if not (each.is_meta or each.is_inference()))
    return [each._version for each in counted]


def _unknown(name: str, found: str) -> UserError:
    return UserError(f"{name} is of a shape that is not known here: {found}; see docs/models.md")


UNRELATED = ("transformers_version", "torch_dtype", "dtype")


@torch.no_grad()
def weights_content(model: PreTrainedModel) -> str:
    """Return a digest of every weight of a model, adapters included, and of its configuration.

    An adapter that is on gives another one than the same adapter switched off. It does not depend
    on the device; weights that are kept elsewhere are fetched module by module.
    """
    tensors = {name: tensor_digest(tensor) for name, tensor in _weights(model)}
    generation = model.generation_config
    settings = [model.config.to_dict(), None if generation is None else generation.to_dict()]
    related = [
        {k: v for k, v in (each or {}).items() if not k.startswith("_") and k not in UNRELATED}
        for each in settings
    ]
    on = {
        each
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters
        for each in module.active_adapters
    }
    return digest_of([tensors, related, *sorted(on)])


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer: its vocabulary, its rules and its chat template."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else type(tokenizer).__name__
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of([tokenizer.chat_template, rules, tokenizer.get_vocab(), special])


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    stored = set(model.state_dict())
    for prefix, module in model.named_modules():
        with align_module_device(module):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                whole = f"{prefix}.{name}" if prefix else name
                if whole in stored:
                    yield whole, tensor


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide that PEFT reads a name which transformers renames: nobody here can mend it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        yield
