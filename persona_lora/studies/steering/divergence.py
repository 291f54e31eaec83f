"""How far steering moves the model: relative norm, and divergence on ordinary prompts.

Raw coefficients do not travel between models, methods and training recipes; these two do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from persona_lora.core import progress
from persona_lora.core.chat import Condition, Place, user_question
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import GenerationOptions
from persona_lora.models.generation import Generated, generate_answers
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.likelihood import TokenizedExchange, token_divergences, tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_layers, in_memory, weight_of
from persona_lora.steering.bank import Bank, Coefficients
from persona_lora.steering.placement import find_modules
from persona_lora.studies.asking.run import Row, generate_rows

ANSWER_TOKENS = 40
ROWS_PER_PASS = 16


@dataclass(frozen=True)
class Divergence:
    """What one condition does to the model.

    ``relative_weight_norm`` is ‖cΔW‖ / ‖W‖ over the touched modules (diffs);
    ``relative_state_norm`` is ‖cv‖ / mean ‖h‖ over the answer tokens at the layer (vectors).
    ``kl_mean`` and ``kl_p95`` are the mean and the 95th percentile over tokens of
    KL(p_base ‖ p_steered) in nats, on the base model's own greedy answers to ordinary prompts;
    ``num_tokens`` is how many there were.
    """

    method: str
    layer: Place | None
    coefficient: float
    relative_weight_norm: float | None
    relative_state_norm: float | None
    kl_mean: float
    kl_p95: float
    num_tokens: int


def measure_divergences(
    chat_model: ChatModel, bank: Bank, conditions: Sequence[Condition], prompts: Sequence[str]
) -> list[Divergence]:
    """Measure the divergence of every condition with a coefficient, many of them a forward pass."""
    texts = ordinary_texts(chat_model, prompts)
    steered = [each for each in conditions if each.coefficient is not None]
    starts = range(0, len(steered), ROWS_PER_PASS)
    weight_norms = {name: relative_weight_norm(chat_model, bank.diffs[name]) for name in bank.diffs}
    found: list[Divergence] = []
    passes = count()

    def before(index: int) -> None:
        norms.answer = len(texts[index].answer)
        progress.report(next(passes), len(starts) * len(texts))

    with _StateNorms(chat_model.model) as norms:
        for chunk in (steered[start : start + ROWS_PER_PASS] for start in starts):
            rows = [each.coefficients for each in chunk]
            divergences = row_divergences(chat_model, bank, rows, texts, before_text=before)
            relative = {**weight_norms, **_state_norms(bank, norms.means())}
            found += [
                _divergence(condition, row, bank, relative.get(condition.direction))
                for condition, row in zip(chunk, divergences, strict=True)
            ]
    progress.report(len(starts) * len(texts), len(starts) * len(texts))
    return found


def row_divergences(
    chat_model: ChatModel,
    bank: Bank,
    rows: Sequence[Coefficients],
    texts: Sequence[TokenizedExchange],
    *,
    before_text: Callable[[int], None] | None = None,
) -> Tensor:
    """Return KL(p₀ ‖ pᵣ) of every row at every answer token: ``[rows, tokens]``.

    p₀ is unsteered, in the same batches. float64, on the CPU.
    """
    every = [{}, *rows]
    by_token = []
    with bank.steerer(chat_model, every) as steerer:
        steerer.select_rows(range(len(every)))
        for index, text in enumerate(texts):
            if before_text is not None:
                before_text(index)
            steerer.select_positions(_response_mask(text))
            by_token.append(token_divergences(chat_model, text, num_rows=len(every)))
    return torch.cat(by_token, dim=1).double().cpu()


def ordinary_texts(chat_model: ChatModel, prompts: Sequence[str]) -> list[TokenizedExchange]:
    """Return the prompts with the unsteered model's own greedy answers, as token ids."""
    questions = [user_question(prompt) for prompt in prompts]
    with progress.silent():
        answers = generate_answers(chat_model, questions, max_new_tokens=ANSWER_TOKENS)
    said = [answer for answer in answers if answer.text]
    if not said:
        raise UserError(f"{chat_model.name} answers none of the ordinary prompts")
    return [tokenize_rendered(chat_model, each.prompt, each.text) for each in said]


def own_texts(
    chat_model: ChatModel, bank: Bank, rows: Sequence[Coefficients], questions: Sequence[str]
) -> list[list[TokenizedExchange]]:
    """Return each row's own greedy answers to the questions, as token ids; empty ones left out."""
    by_row = [
        [tokenize_rendered(chat_model, each.prompt, each.text) for each in answers]
        for answers in own_answers(chat_model, bank, rows, questions)
    ]
    return [[text for text in texts if text.answer] for texts in by_row]


def own_answers(
    chat_model: ChatModel,
    bank: Bank,
    rows: Sequence[Coefficients],
    questions: Sequence[str],
    options: GenerationOptions = GenerationOptions(max_new_tokens=ANSWER_TOKENS),
) -> list[list[Generated]]:
    """Return each row's own answers to the questions, greedy by default."""
    plan = [Row(question, at) for at in range(len(rows)) for question in questions]
    steerer = bank.steerer(chat_model, [rows[each.condition] for each in plan])
    with progress.silent():
        answers = generate_rows(chat_model, plan, steerer, options)
    each = len(questions)
    return [answers[at * each : (at + 1) * each] for at in range(len(rows))]


def _response_mask(text: TokenizedExchange) -> Tensor:
    """Return where generation would have steered the response: from the last prompt token on."""
    positions = torch.arange(len(text.prompt) + len(text.answer))
    return (positions >= len(text.prompt) - 1)[None]


def _divergence(
    condition: Condition, divergences: Tensor, bank: Bank, relative: float | None
) -> Divergence:
    """Return what a condition does, whose direction is ``relative`` to weights or to states."""
    coefficient = float(condition.coefficient or 0.0)
    norm = None if relative is None else abs(coefficient) * relative
    of_weights = condition.direction in bank.diffs
    return Divergence(
        method=condition.method,
        layer=condition.layer,
        coefficient=coefficient,
        relative_weight_norm=norm if of_weights else None,
        relative_state_norm=None if of_weights else norm,
        kl_mean=float(divergences.mean()),
        kl_p95=float(divergences.quantile(0.95)),
        num_tokens=len(divergences),
    )


def _state_norms(bank: Bank, mean_states: Mapping[int, float]) -> dict[str, float]:
    """Return ‖v‖ / mean ‖h‖ of every vector, by name; of those at one layer."""
    return {
        name: vector.norms()[layer] / mean_states[layer]
        for name, vector in bank.vectors.items()
        for layer in vector.layers
        if len(vector.layers) == 1
    }


class _StateNorms(Hooked):
    """Context manager: running means of ‖h‖ over the answer of the unsteered row, by layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.answer = 0
        self._blocks = decoder_layers(model)
        self._sums: dict[int, tuple[float, int]] = {}

    def hooks(self) -> list[Hook]:
        """Return a hook on every block."""
        return [
            Hook(block, partial(self._note, layer), f"block {layer}")
            for layer, block in enumerate(self._blocks)
        ]

    def _note(self, layer: int, module: nn.Module, arguments: object, output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        lengths = hidden[0, -self.answer :].float().norm(dim=-1)
        total, count = self._sums.get(layer, (0.0, 0))
        self._sums[layer] = total + float(lengths.sum()), count + len(lengths)

    def means(self) -> dict[int, float]:
        return {layer: total / count for layer, (total, count) in self._sums.items()}


def relative_weight_norm(chat_model: ChatModel, diff: LoRADiff) -> float:
    """Return ‖ΔW‖ / ‖W‖ (Frobenius, over the modules that the diff touches)."""
    return diff.norm() / weight_norm(chat_model, diff)


@torch.no_grad()
def weight_norm(chat_model: ChatModel, diff: LoRADiff) -> float:
    """Return ‖W‖ (Frobenius) over the modules that a diff changes; UserError for one not there."""
    squares = []
    for name, module in find_modules(chat_model.model, diff).items():
        with in_memory(module, name):
            squares.append(float(weight_of(module).float().square().sum()))
    return math.sqrt(math.fsum(squares))
