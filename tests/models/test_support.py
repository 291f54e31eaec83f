from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from persona_lora.core.errors import UserError
from persona_lora.models.loaded_model import check_support
from persona_lora.models.loading import load_chat_model
from persona_lora.models.structure import decoder_layers
from tests.conftest import byte_tokenizer
from tests.models.architectures import SHAPE, tiny_model

TOKENS = [70, 80, 90]


def test_a_known_shape_passes_and_keeps_no_hook():
    model = tiny_model("Llama")
    check_support(model, TOKENS, "tiny")
    assert not any(module._forward_hooks for module in model.modules())


class Twice(nn.Module):
    """A block that runs another one twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, **keywords: object) -> Tensor:
        return self.block(self.block(hidden, **keywords), **keywords)


class Narrowed(nn.Module):
    """A block whose output is no hidden state."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, **keywords: object) -> list[Tensor]:
        return [self.block(hidden, **keywords)]


def test_a_block_that_does_not_run_once_or_gives_no_states_is_refused():
    model = tiny_model("Llama")
    first, second = decoder_layers(model)
    model.model.layers = nn.ModuleList([Twice(second), second])
    with pytest.raises(UserError, match=r"tiny is of a shape .*: its 2 blocks ran 4 times"):
        check_support(model, TOKENS, "tiny")
    model.model.layers = nn.ModuleList([first, Narrowed(second)])
    with pytest.raises(UserError, match="block 1 gives no hidden states"):
        check_support(model, TOKENS, "tiny")


@pytest.mark.parametrize(
    ("model_type", "settings", "found"),
    [
        (
            "doge",
            {**SHAPE, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
            "what it says at a token depends on tokens behind it or on other rows",
        ),
        (
            "rwkv",
            {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "rescale_every": 1},
            "it changes its weights while it runs",
        ),
    ],
)
def test_a_model_that_reads_ahead_or_writes_its_weights_is_refused(model_type, settings, found):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    with pytest.raises(UserError, match=f"tiny is of a shape that is not known here: {found}"):
        check_support(model, TOKENS, "tiny")


def test_blocks_of_an_unknown_name_are_refused():
    model = tiny_model("Llama")
    model.model.stages = model.model.layers
    model.model.forward = lambda *_, **__: None
    del model.model.layers
    with pytest.raises(UserError, match=r"its blocks are called model\.stages\.N"):
        check_support(model, TOKENS, "tiny")


def test_a_model_that_gives_nan_is_refused_when_it_is_loaded(tmp_path):
    model = tiny_model("Llama")
    decoder_layers(model)[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gives NaN or infinity for three tokens"):
        load_chat_model(str(tmp_path))
    assert torch.isnan(
        load_chat_model(str(tmp_path), probe=False).model.model.layers[0].mlp.up_proj.weight
    ).any()


@pytest.mark.parametrize("error", [RuntimeError("sizes of 4\nand 8"), KeyError("1"), IndexError()])
def test_a_model_whose_own_code_fails_is_refused(error):
    model = tiny_model("Llama")

    def fail(*_: object, **__: object) -> None:
        raise error

    model.model.forward = fail
    said = f"tiny cannot read three tokens: LlamaForCausalLM fails with {type(error).__name__}"
    with pytest.raises(UserError, match=said):
        check_support(model, TOKENS, "tiny")


@pytest.mark.parametrize(
    "error", [RuntimeError("can't allocate memory"), MemoryError(), OSError(5, "w.dat")]
)
def test_memory_and_disks_are_no_fault_of_a_model(error):
    model = tiny_model("Llama")

    def fail(*_: object, **__: object) -> None:
        raise error

    model.model.forward = fail
    with pytest.raises(type(error)) as caught:
        check_support(model, TOKENS, "tiny")
    assert caught.value is error
