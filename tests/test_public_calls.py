"""A wrong value for a public name is a UserError and no traceback, as docs/api.md promises."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_lora import (
    ActivationSteerer,
    ChatModel,
    Coefficients,
    DirectionAblation,
    DriftMonitor,
    LiveLoRA,
    LoRADiff,
    LoRAMerger,
    LoRASteerer,
    SteeringVector,
    UserError,
    WeightProjector,
    generate_answers,
    load_persona,
    load_trait,
    mix,
)
from persona_lora.core.lora_diff import BaseModel
from persona_lora.projections.inputs import measure_inputs
from persona_lora.training.drift import lora_change

TOKENS = torch.tensor([[5, 9, 17]])
QUESTION = [{"role": "user", "content": "hi"}]


@dataclass
class Things:
    """What the calls are made with, where they are made right."""

    chat: ChatModel
    diff: LoRADiff
    vector: SteeringVector
    folder: Path

    @property
    def model(self):
        return self.chat.model

    def inside(self, steerer):
        with steerer:
            return self.model(TOKENS).logits

    def answers(self, conversations=(QUESTION,), **options):
        return generate_answers(self.chat, conversations, **{"max_new_tokens": 2, **options})

    def rows(self, rows):
        with LiveLoRA(self.model, [self.diff], [[0.0], [1.0]]) as steerer:
            steerer.select_rows(rows)


@pytest.fixture
def things(chat_model, make_diff, tmp_path):
    vector = SteeringVector({at: torch.ones(32) for at in (0, 1)}, BaseModel("tiny"), 2)
    return Things(chat_model, make_diff(chat_model.model, seed=1), vector, tmp_path)


CALLS = {
    "LiveLoRA(model)": lambda t, v: LiveLoRA(v, [t.diff], [[1.0]]),
    "LiveLoRA(diffs)": lambda t, v: t.inside(LiveLoRA(t.model, v, [[1.0]])),
    "LiveLoRA(a diff)": lambda t, v: t.inside(LiveLoRA(t.model, [v], [[1.0]])),
    "LiveLoRA(coefficients)": lambda t, v: t.inside(LiveLoRA(t.model, [t.diff], v)),
    "LiveLoRA(a row)": lambda t, v: t.inside(LiveLoRA(t.model, [t.diff], [v])),
    "LiveLoRA(a number)": lambda t, v: t.inside(LiveLoRA(t.model, [t.diff], [[v]])),
    "select_rows": lambda t, v: t.rows(v),
    "select_rows(a row)": lambda t, v: t.rows([v]),
    "LoRASteerer(model)": lambda t, v: LoRASteerer(v, t.diff),
    "LoRASteerer(diff)": lambda t, v: t.inside(LoRASteerer(t.model, v)),
    "LoRASteerer(coefficient)": lambda t, v: t.inside(LoRASteerer(t.model, t.diff, v)),
    "LoRASteerer(mapping)": lambda t, v: t.inside(LoRASteerer(t.model, {t.diff: v})),
    "LoRASteerer(layers)": lambda t, v: t.inside(LoRASteerer(t.model, t.diff, layers=v)),
    "LoRAMerger(model)": lambda t, v: LoRAMerger(v).merge_lora_diff(t.diff),
    "ActivationSteerer(model)": lambda t, v: ActivationSteerer(v, t.vector),
    "ActivationSteerer(vector)": lambda t, v: t.inside(ActivationSteerer(t.model, v)),
    "ActivationSteerer(a vector)": lambda t, v: t.inside(ActivationSteerer(t.model, [v])),
    "ActivationSteerer(coefficient)": lambda t, v: t.inside(
        ActivationSteerer(t.model, t.vector, v)
    ),
    "ActivationSteerer(layers)": lambda t, v: t.inside(
        ActivationSteerer(t.model, t.vector, 1.0, v)
    ),
    "DirectionAblation(model)": lambda t, v: DirectionAblation(v, t.vector),
    "DirectionAblation(vector)": lambda t, v: t.inside(DirectionAblation(t.model, v)),
    "DirectionAblation(layers)": lambda t, v: t.inside(DirectionAblation(t.model, t.vector, v)),
    "mix": lambda t, v: mix(v),
    "mix(coefficient)": lambda t, v: mix({t.diff: v}),
    "diff.inner": lambda t, v: t.diff.inner(v),
    "diff.cosine": lambda t, v: t.diff.cosine(v),
    "diff / ": lambda t, v: t.diff / v,
    "diff.at": lambda t, v: t.diff.at(v),
    "diff.save": lambda t, v: replace(t.diff, sources={"made of": v}).save(t.folder / "diff"),
    "vector.cosine": lambda t, v: t.vector.cosine(v),
    "vector / ": lambda t, v: t.vector / v,
    "vector.at": lambda t, v: t.vector.at(v),
    "vector.save": lambda t, v: replace(t.vector, sources={"made of": v}).save(
        t.folder / "v.safetensors"
    ),
    "Coefficients.of": lambda t, v: Coefficients.of({"evil": v}),
    "generate_answers(conversation)": lambda t, v: t.answers([v]),
    "generate_answers(message)": lambda t, v: t.answers([[v]]),
    "generate_answers(content)": lambda t, v: t.answers([[{"role": "user", "content": v}]]),
    "generate_answers(max_new_tokens)": lambda t, v: t.answers(max_new_tokens=v),
    "generate_answers(temperature)": lambda t, v: t.answers(temperature=v),
    "generate_answers(seed)": lambda t, v: t.answers(seed=v, temperature=1.0),
    "generate_answers(batch_size)": lambda t, v: t.answers(batch_size=v),
    "DriftMonitor(diffs)": lambda t, v: DriftMonitor(v),
    "DriftMonitor(a diff)": lambda t, v: DriftMonitor([v]),
    "lora_change": lambda t, v: lora_change(v),
    "WeightProjector(model)": lambda t, v: WeightProjector.compute_layer_projections(
        v, t.diff, original=t.model
    ),
    "WeightProjector(diff)": lambda t, v: WeightProjector.compute_layer_projections(
        t.model, v, original=t.model
    ),
    "load_persona": lambda t, v: load_persona(v),
    "load_trait": lambda t, v: load_trait(v),
    "measure_inputs(prompt)": lambda t, v: measure_inputs(t.chat, [v]),
}
VALUES: dict[str, Any] = {
    "a chat model": lambda t: t.chat,
    "a number": lambda t: 1.0,
    "a whole number": lambda t: 1,
    "too large": lambda t: 1e39,
    "too large and whole": lambda t: 10**400,
    "a flat list": lambda t: [1.0],
    "an empty list": lambda t: [],
    "a list of an empty one": lambda t: [[]],
    "a generator": lambda t: (at for at in (0, 1)),
    "numpy's number": lambda t: np.float32(1.0),
    "numpy's whole number": lambda t: np.int64(1),
    "numpy's array": lambda t: np.array([1.0]),
    "torch's number": lambda t: torch.tensor(1.0),
    "torch's array": lambda t: torch.tensor([1.0]),
    "a text": lambda t: "1",
    "a strength": lambda t: "0.1nat",
    "nothing": lambda t: None,
    "an empty mapping": lambda t: {},
    "a path": lambda t: Path("nowhere"),
    "a diff": lambda t: t.diff,
    "a vector": lambda t: t.vector,
}


@pytest.mark.parametrize("call", CALLS)
def test_any_value_works_or_is_named(things, call):
    for made in VALUES.values():
        with suppress(UserError):
            CALLS[call](things, made(things))
