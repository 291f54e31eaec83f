"""Ctrl-C at every instruction of ours: no hook is left, and no bit of a weight is changed."""

from __future__ import annotations

import dis
import gc
import linecache
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import persona_lora
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models import structure
from persona_lora.models.turns import HOLDINGS
from persona_lora.steering import placement, weights
from persona_lora.steering.activations import (
    ActivationSteerer,
    BoundedSteerer,
    ConditionalSteerer,
    DirectionAblation,
)
from persona_lora.steering.ledger import LOCK, MERGED
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.steerer import Together
from persona_lora.steering.weights import LoRASteerer

PACKAGE = str(Path(persona_lora.__file__).parent)
# These only read, and do so at length: they are interrupted at every line, all others everywhere.
READERS = ("structure.py", "lora_diff.py", "placement.py")
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


@cache
def leaving(code) -> frozenset[int]:
    """Return where no signal comes: Python looks for them after calls, and at jumps back.

    Between a block's last call and the exit of its "with" there is none, nor at what does nothing.
    """
    return frozenset(
        each.offset
        for each in dis.get_instructions(code)
        if each.opname == "NOP"
        or (
            each.opname in ("SWAP", "LOAD_CONST", "PRECALL", "CALL")
            and linecache.getline(code.co_filename, each.positions.lineno or 0)
            .lstrip()
            .startswith("with ")
        )
    )


class InterruptAt:
    """Raises KeyboardInterrupt at one instruction of this package's code."""

    def __init__(self, point: int) -> None:
        self.point = point
        self.count = 0

    def __enter__(self):
        gc.disable()  # an interrupt of a finalizer is printed and forgotten by Python itself
        sys.settrace(self.enter_frame)

    def __exit__(self, *_):
        sys.settrace(None)
        gc.enable()

    def enter_frame(self, frame, event, argument):
        ours = frame.f_code.co_filename.startswith(PACKAGE)
        # A context manager that is made of a generator runs frames of the library's, too.
        if not ours and not frame.f_code.co_qualname.startswith("_GeneratorContextManager."):
            return None
        frame.f_trace_lines = frame.f_code.co_filename.endswith(READERS)
        frame.f_trace_opcodes = not frame.f_trace_lines
        return self.in_frame

    def in_frame(self, frame, event, argument):
        if event in ("opcode", "line") and frame.f_lasti not in leaving(frame.f_code):
            self.count += 1
            if self.count == self.point:
                raise KeyboardInterrupt
        return self.in_frame


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def diff_of(seed: int) -> LoRADiff:
    torch.manual_seed(seed)
    factors = {name: LoRAFactors(torch.randn(1, 8), torch.randn(8, 1)) for name in NAMES}
    return LoRADiff(factors, BaseModel("small"))


DIFF = diff_of(1)
VECTOR = SteeringVector({0: torch.ones(8)}, BaseModel("small"), num_layers=1)
STEERERS = {
    "merged": lambda model: LoRASteerer(model, DIFF),
    "live": lambda model: LiveLoRA(model, [DIFF], [[1.0]]),
    "activations": lambda model: ActivationSteerer(model, VECTOR),
    "ablation": lambda model: DirectionAblation(model, VECTOR),
    "bounded": lambda model: BoundedSteerer(model, VECTOR, 0.0, None),
    "conditional": lambda model: ConditionalSteerer(model, VECTOR, 1.0, VECTOR),
    "together": lambda model: Together(
        [ActivationSteerer(model, VECTOR), LoRASteerer(model, DIFF)]
    ),
}


def hooks_on(model) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def is_free(lock) -> bool:
    """Say whether another thread gets the lock: the one that holds it may take it again."""

    def tried() -> bool:
        got = lock.acquire(blocking=False)
        if got:
            lock.release()
        return got

    with ThreadPoolExecutor(1) as others:
        return others.submit(tried).result()


def bits(model) -> list[torch.Tensor]:
    return [each.detach().clone() for each in model.parameters()]


class Stopwatch:
    """The body of a block: notes how many instructions went before it, and may fail."""

    def __init__(self, error: type[Exception] | None) -> None:
        self.error = error
        self.before = 0

    def run(self, interrupt: InterruptAt) -> None:
        self.before = self.before or interrupt.count
        if self.error is not None:
            raise self.error


def interrupted(point, steerer, body) -> bool:
    """Enter and leave a steerer's block; say whether Ctrl-C came, and came through."""
    interrupt = InterruptAt(point)
    try:
        with interrupt, steerer:
            body.run(interrupt)
    except KeyboardInterrupt:
        return True
    except ValueError:
        return False
    return False


@pytest.mark.parametrize("error", [None, ValueError])
@pytest.mark.parametrize("name", STEERERS)
def test_an_interrupt_at_any_instruction_leaves_nothing_behind(small, monkeypatch, name, error):
    known = structure.linear_modules(small)  # looked at once: reading a model is no change to it
    for module in (placement, weights):
        monkeypatch.setattr(module, "linear_modules", lambda model: known)
    monkeypatch.setattr(placement, "tied_names", lambda model: {})
    monkeypatch.setattr(placement, "weight_fingerprint", lambda model: "a fingerprint")
    before = bits(small)
    body = Stopwatch(error)
    assert not interrupted(0, STEERERS[name](small), body)
    point = 1 if error is None else body.before  # entering is the same with an error and without
    while True:
        steerer = STEERERS[name](small)
        stopped = interrupted(point, steerer, body)
        assert hooks_on(small) == 0, f"point {point}"
        assert all(map(torch.equal, small.parameters(), before)), f"point {point}"
        assert len(MERGED) == len(HOLDINGS) == 0, f"point {point}"
        assert is_free(LOCK), f"point {point}"
        if not stopped:
            break
        point += 1
    assert point > body.before + 20
