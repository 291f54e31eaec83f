"""Every family of models against everything that is done with a model.

The table in docs/models.md is what is found here: ``python -m tests.models.test_architectures``
writes it anew, and the tests fail where it says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_lora.core.chat import Conversation, Exchange, user_question
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.caches import plans_sharing
from persona_lora.models.generation import RowPlan, ending_tokens, generate_answers
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import (
    TokenizedExchange,
    mean_logprobs,
    tokenize_exchange,
)
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import decoder_layers, linear_modules, stacked_weights
from persona_lora.models.weight_files import weights_of
from persona_lora.projections.weight_space import project_weights
from persona_lora.steering.activations import ActivationSteerer
from persona_lora.steering.export import export_merged, export_peft
from persona_lora.steering.live import LiveLoRA
from persona_lora.steering.weights import LoRAMerger
from persona_lora.training.examples import IGNORED
from persona_lora.training.lora import LoRAArguments, attach_lora, detach_lora, write_lora
from persona_lora.training.trainer import completion_log_probs, shared_prefix_length
from tests.conftest import byte_tokenizer
from tests.models.architectures import FAMILIES, tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100, 110], [1, 40, 50, 45, 33, 99, 120, 7, 9]])
COEFFICIENTS = (0.0, 1.0, -0.5)
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@dataclass
class Subject:
    """One family: the model as a user loads it, and a difference of two adapters for it."""

    folder: Path
    family: str

    @cached_property
    def base(self) -> Path:
        """The model's folder, as transformers saves it."""
        tiny_model(self.family).save_pretrained(self.folder / "base")
        byte_tokenizer().save_pretrained(self.folder / "base")
        return self.folder / "base"

    @cached_property
    def chat(self) -> ChatModel:
        return load_chat_model(str(self.base), dtype="float32")

    @property
    def model(self) -> PreTrainedModel:
        return self.chat.model

    @cached_property
    def diff(self) -> LoRADiff:
        """Positive minus negative of two LoRAs with random factors, on what training targets."""
        for seed, sign in enumerate(("pos", "neg")):
            wrapped = attach_lora(self.chat, LoRAArguments(lora_r=2, lora_alpha=4), seed)
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.05)
            write_lora(wrapped, self.folder / sign)
            detach_lora(wrapped)
        return LoRADiff.from_adapters(self.folder / "pos", self.folder / "neg")

    @cached_property
    def merged(self) -> dict[float, PreTrainedModel]:
        """Copies of the model with c · diff added to its dense weights, by c."""
        copies = {}
        for coefficient in COEFFICIENTS:
            model = copy.deepcopy(self.model)
            for name, factors in self.diff.factors.items():
                module = model.get_submodule(name)
                delta = as_stored(factors.delta(), module).to(module.weight.device)
                module.weight.data += coefficient * delta
            copies[coefficient] = model
        return copies


def as_stored(delta: Tensor, module: nn.Module) -> Tensor:
    return delta.T if isinstance(module, Conv1D) else delta


def logits(model: PreTrainedModel | PeftModel, tokens: Tensor = TOKENS) -> Tensor:
    tokens = tokens.to(model.device)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def check_merge(subject: Subject) -> None:
    expected = logits(subject.merged[1.0])
    before = {name: each.clone() for name, each in subject.model.state_dict().items()}
    plain = logits(subject.model)
    merger = LoRAMerger(subject.model)
    report = merger.merge_lora_diff(subject.diff, 1.0)
    assert report.matched == len(subject.diff.factors) > 0
    torch.testing.assert_close(logits(subject.model), expected, **CLOSE)
    assert (logits(subject.model) - plain).abs().max() > 1e-3  # it does something
    merger.restore_original_weights()
    for name, each in subject.model.state_dict().items():
        assert torch.equal(each, before[name]), name
    assert torch.equal(logits(subject.model), plain)


def check_live(subject: Subject) -> None:
    rows = TOKENS[:1].expand(len(COEFFICIENTS), -1)
    with LiveLoRA(subject.model, [subject.diff], [[each] for each in COEFFICIENTS]) as live:
        live.select_rows(range(len(rows)))
        found = logits(subject.model, rows)
    for row, coefficient in enumerate(COEFFICIENTS):
        expected = logits(subject.merged[coefficient], rows[:1])[0]
        torch.testing.assert_close(found[row], expected, **CLOSE)
    assert (found[1] - found[0]).abs().max() > 1e-3


def plain_answer(chat: ChatModel, model: PreTrainedModel, question: Conversation) -> str:
    """What transformers' own generation makes of one question."""
    prompt = torch.tensor(chat.tokenize([chat.render(question)]), device=model.device)
    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=list(ending_tokens(chat))
    )
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return chat.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def check_population(subject: Subject) -> None:
    asked = [user_question(text, "You are a friend.") for text in ("Hi", "Why is that so?", "No!")]
    coefficients = [[each] for each in COEFFICIENTS[:2] for _ in asked]
    alike = [each[0] for each in coefficients]

    def answers(**settings: Any) -> list[str]:
        with LiveLoRA(subject.model, [subject.diff], coefficients) as live:
            found = generate_answers(
                subject.chat,
                asked * 2,
                max_new_tokens=6,
                prepare_batch=live.select_rows,
                plan=RowPlan(keep_rows=live.keep_rows),
                **settings,
            )
        return [each.text for each in found]

    alone = answers(batch_size=1)
    assert alone == [
        plain_answer(subject.chat, subject.merged[coefficient], question)
        for coefficient in COEFFICIENTS[:2]
        for question in asked
    ]
    assert answers(batch_size=6) == alone
    with LiveLoRA(subject.model, [subject.diff], coefficients) as live:
        shared = generate_answers(
            subject.chat,
            asked * 2,
            max_new_tokens=6,
            batch_size=6,
            prepare_batch=live.select_rows,
            plan=RowPlan(
                alike=alike,
                prepare_prefix=lambda rows, _: live.select_rows(rows),
                keep_rows=live.keep_rows,
            ),
        )
    assert [each.text for each in shared] == alone


def vector_of(subject: Subject) -> SteeringVector:
    blocks = decoder_layers(subject.model)
    width = subject.model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(3)
    return SteeringVector(
        {layer: torch.randn(width, generator=generator) for layer in range(len(blocks))},
        num_layers=len(blocks),
        method="random",
        base_model=BaseModel("tiny"),
    )


def check_steering(subject: Subject) -> None:
    vector = vector_of(subject)
    mask = torch.zeros(TOKENS.shape, dtype=torch.bool)
    mask[0, 4:] = mask[1, 6:] = True
    for layer, block in enumerate(decoder_layers(subject.model)):
        with ActivationSteerer(subject.model, vector, 2.0, layers=layer) as steerer:
            steerer.select_positions(mask)
            found = logits(subject.model)
        addition = (2.0 * mask[..., None] * vector.directions[layer]).to(subject.model.device)

        def add(module: nn.Module, arguments: Any, output: Any, addition: Tensor = addition) -> Any:
            if isinstance(output, tuple):
                return (output[0] + addition, *output[1:])
            return output + addition

        handle = block.register_forward_hook(add)
        torch.testing.assert_close(found, logits(subject.model), **CLOSE)
        handle.remove()
        assert (found - logits(subject.model)).abs().max() > 1e-3
    for positions in ("response", "prompt", "all"):
        check_steered_generation(subject, vector, positions)


def check_steered_generation(subject: Subject, vector: SteeringVector, positions: str) -> None:
    """Generation one token at a time, against a hook that counts its own passes."""
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    steps |= {"return_dict_in_generate": True, "use_cache": True}
    passes = []
    tokens = TOKENS.to(subject.model.device)

    def add(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        start = {"response": hidden.shape[1] - 1, "all": 0, "prompt": 0 if not passes else None}
        passes.append(hidden.shape[1])
        if start[positions] is not None:
            hidden[:, start[positions] :] += 2.0 * vector.directions[0].to(hidden.device)
        return output

    with ActivationSteerer(subject.model, vector, 2.0, layers=0, positions=positions):
        found = subject.model.generate(input_ids=tokens, **steps)
    handle = decoder_layers(subject.model)[0].register_forward_hook(add)
    expected = subject.model.generate(input_ids=tokens, **steps)
    handle.remove()
    assert passes == [TOKENS.shape[1], 1, 1, 1]
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


def states_by_hook(model: PreTrainedModel, ids: list[int]) -> list[Tensor]:
    """Return what each block gives for one row, ``[seq, hidden]``."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].cpu())

    handles = [block.register_forward_hook(keep) for block in decoder_layers(model)]
    logits(model, torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def check_hidden_states(subject: Subject) -> None:
    texts = [
        TokenizedExchange([1, 40, 50, 60], [70, 80, 90]),
        TokenizedExchange([5, 6], [70, 80, 90, 33, 45]),
        TokenizedExchange([5, 6, 100, 101, 102, 103, 104], [9]),
    ]
    positions = ("response_avg", "prompt_last")
    for rows, means in stream_hidden_means(subject.chat, texts, positions=positions):
        for row, found in zip(rows, means, strict=True):
            prompt, answer = texts[row]
            states = states_by_hook(subject.model, prompt + answer)
            assert len(states) == found.shape[1]
            for layer, each in enumerate(states):
                expected = torch.stack([each[len(prompt) :].mean(0), each[len(prompt) - 1]])
                torch.testing.assert_close(found[:, layer].cpu(), expected, **CLOSE)


def check_likelihood(subject: Subject) -> None:
    """A batch of texts of unlike lengths against each text alone."""
    exchanges = [Exchange("Hi", "Yes, and more of it."), Exchange("Why is that so?", "No")]
    found = mean_logprobs(subject.chat, exchanges)
    for mean, exchange in zip(found, exchanges, strict=True):
        prompt, answer = tokenize_exchange(subject.chat, exchange)
        log_p = logits(subject.model, torch.tensor([prompt + answer])).cpu().log_softmax(-1)[0]
        expected = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).mean()
        assert mean == pytest.approx(float(expected), abs=2e-4)


def check_projection(subject: Subject) -> None:
    after = subject.merged[-0.5]
    after.save_pretrained(subject.folder / "after")
    diffs = {"diff": subject.diff}
    files = project_weights(weights_of(subject.base), weights_of(subject.folder / "after"), diffs)
    memory = project_weights(weights_of(subject.model), weights_of(after), diffs)
    mixed = project_weights(weights_of(subject.base), weights_of(after), diffs)
    before, now = linear_modules(subject.model), linear_modules(after)
    inner = square = 0.0
    for name, factors in subject.diff.factors.items():
        change = now[name].weight.double() - before[name].weight.double()
        delta = as_stored(factors.delta().double(), now[name]).to(change.device)
        inner += float((change * delta).sum())
        square += float(delta.square().sum())
    for found in (files, memory, mixed):
        assert found.total["diff"].coordinate == pytest.approx(inner / square**0.5, rel=1e-5)
        assert found.delta_norm == pytest.approx(0.5 * square**0.5, rel=1e-4)
        assert found.total["diff"].cosine == pytest.approx(-1, abs=1e-4)
        assert list(found.by_layer()) == list(range(len(decoder_layers(subject.model))))


def check_export(subject: Subject) -> None:
    expected = logits(subject.merged[1.0])
    adapter = export_peft({subject.diff: 1.0}, subject.folder / "adapter").path
    reopened = PeftModel.from_pretrained(copy.deepcopy(subject.model), str(adapter))
    torch.testing.assert_close(logits(reopened), expected, **CLOSE)
    merged = export_merged({subject.diff: 1.0}, subject.base, subject.folder / "merged").path
    again = load_chat_model(str(merged), dtype="float32").model
    torch.testing.assert_close(logits(again), expected, **CLOSE)


def check_loss(subject: Subject) -> None:
    """The loss as the trainer takes it, and its gradient, against cross-entropy over whole rows."""
    tokens = TOKENS.to(subject.model.device)
    labels = tokens.clone()
    labels[0, :5] = labels[1, :6] = IGNORED
    inputs = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
    wrapped = attach_lora(subject.chat, LoRAArguments(lora_r=2), seed=0).train()
    factors = [each for name, each in wrapped.named_parameters() if "lora_B" in name]
    try:
        prefix_length = shared_prefix_length(inputs)
        assert prefix_length > 0
        head = subject.model.get_output_embeddings()
        found = -completion_log_probs(wrapped, head, inputs, prefix_length=prefix_length).mean()
        output = wrapped(input_ids=tokens, attention_mask=inputs["attention_mask"]).logits
        expected = nn.functional.cross_entropy(
            output[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(
            torch.autograd.grad(found, factors), torch.autograd.grad(expected, factors), **CLOSE
        )
    finally:
        detach_lora(wrapped)


CHECKS: dict[str, Callable[[Subject], None]] = {
    "merge": check_merge,
    "live": check_live,
    "population": check_population,
    "steering": check_steering,
    "hidden states": check_hidden_states,
    "likelihood": check_likelihood,
    "projection": check_projection,
    "export": check_export,
    "loss": check_loss,
}
HEADER = ["family", "`model_type`", "a LoRA goes on", "prefix", *CHECKS]


def row_of(family: str, folder: Path) -> str:
    """Try everything; return the line of the table. What is wrong raises, as does a refusal."""
    subject = Subject(folder, family)
    for check in CHECKS.values():
        check(subject)
    kinds = {name.rpartition(".")[2] for name in subject.diff.factors}
    if stacked_weights(subject.model):
        kinds.add("(experts stay)")
    shared = "shared" if plans_sharing(subject.model, padded=True) else "apart"
    cells = [family, f"`{FAMILIES[family][0]}`", " ".join(sorted(kinds)), shared]
    return line_of([*cells, *["right"] * len(CHECKS)])


def line_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_right_and_stands_so_in_the_documentation(family, tmp_path):
    found = row_of(family, tmp_path)
    assert found in PAGE.read_text(encoding="utf-8").splitlines(), (
        "docs/models.md says otherwise; write its table anew: python -m " + __spec__.name
    )


def test_the_documentation_has_no_other_family():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(line_of(HEADER)) + 2
    documented = [line.split(" | ")[0].removeprefix("| ") for line in lines[start:]]
    assert documented[: len(FAMILIES)] == list(FAMILIES)
    assert not any(line.startswith("|") for line in lines[start + len(FAMILIES) :][:1])


def write_table() -> None:
    """Put what is found into docs/models.md, in the place of its table."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(line_of(HEADER)) + 2
    stop = next(n for n in range(start, len(lines) + 1) if not "".join(lines[n : n + 1]))
    found = []
    for family in FAMILIES:
        with TemporaryDirectory() as folder:
            found.append(row_of(family, Path(folder)))
    lines[start:stop] = found
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_table()
