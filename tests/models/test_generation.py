from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from persona_lora.core import progress
from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.models import caches, generation
from persona_lora.models.decoding import Decoding
from persona_lora.models.generation import (
    LARGEST_BATCH,
    SHORTEST_PREFIX,
    RowPlan,
    SeededSampler,
    _affordable_rows,
    common_prefix,
    ending_tokens,
    generate_answers,
    row_seed,
)
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import mean_logprobs, next_token_logprobs, tokenize_exchange
from persona_lora.models.loading import ChatModel
from persona_lora.projections.inputs import measure_inputs
from tests.conftest import tiny_llama

QUESTIONS = ["a", "a longer question", "mid", "a very much longer question than the others", "z"]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in QUESTIONS]


def texts(answers):
    return [answer.text for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batching_changes_neither_order_nor_samples(chat_model, temperature):
    alone = [
        generate_answers(
            chat_model,
            [conversation],
            max_new_tokens=12,
            temperature=temperature,
            seed=3,
            plan=RowPlan(streams=[row]),
        )[0]
        for row, conversation in enumerate(CONVERSATIONS)
    ]
    for size in (1, 2, 5, "auto"):
        batched = generate_answers(
            chat_model,
            CONVERSATIONS,
            max_new_tokens=12,
            temperature=temperature,
            seed=3,
            batch_size=size,
        )
        assert texts(batched) == texts(alone)
        assert [answer.prompt for answer in batched] == [answer.prompt for answer in alone]


def test_greedy_equals_plain_generate(chat_model):
    prompt = chat_model.render(CONVERSATIONS[1])
    tokens = chat_model.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    plain = chat_model.model.generate(**tokens, max_new_tokens=12, do_sample=False)
    text = chat_model.tokenizer.decode(
        plain[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True
    )
    answers = generate_answers(chat_model, CONVERSATIONS, max_new_tokens=12)
    assert answers[1].text == text.strip()


def test_seeds_and_streams_decide_the_sample(chat_model):
    same = [CONVERSATIONS[0]] * 3
    options = {"max_new_tokens": 12, "temperature": 1.0, "plan": RowPlan(streams=[7, 7, 8])}
    shared = generate_answers(chat_model, same, seed=1, **options)
    assert shared[0].text == shared[1].text != shared[2].text
    other = generate_answers(chat_model, same, seed=2, **options)
    assert other[0].text != shared[0].text


def test_no_stream_of_one_seed_is_a_stream_of_another(chat_model):
    """A sum of both would give question 8 of seed 1 the numbers of question 9 of seed 0."""
    seeds = {row_seed(seed, stream) for seed in range(40) for stream in range(0, 40_000, 97)}
    assert len(seeds) == 40 * len(range(0, 40_000, 97))
    near = {row_seed(seed, stream) for seed in range(40) for stream in range(40)}
    assert len(near) == 40 * 40
    one, other = (
        generate_answers(
            chat_model, [CONVERSATIONS[0]], max_new_tokens=12, temperature=1.0, seed=seed,
            plan=RowPlan(streams=[9 - seed]),
        )
        for seed in (0, 1)
    )  # fmt: skip
    assert one[0].text != other[0].text


def test_the_sampler_draws_from_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]]).expand(20_000, 4)
    sampler = SeededSampler(range(20_000), seed=0, temperature=0.7, num_steps=1)
    drawn = sampler.draw(logits, range(20_000))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.softmax(logits[0] / 0.7, -1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not enough memory")]
)
def test_out_of_memory_halves_the_batch_and_goes_on(chat_model, monkeypatch, error):
    expected = texts(generate_answers(chat_model, CONVERSATIONS, max_new_tokens=6))
    plain = Decoding.begin
    sizes = []

    def begin(self):
        sizes.append(len(self._tokens))
        if len(self._tokens) > 2:
            raise error
        return plain(self)

    monkeypatch.setattr(Decoding, "begin", begin)
    assert texts(generate_answers(chat_model, CONVERSATIONS, max_new_tokens=6)) == expected
    assert sizes == [5, 2, 2, 1]


def test_one_row_that_does_not_fit_is_an_error(chat_model, monkeypatch):
    def begin(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoding, "begin", begin)
    with pytest.raises(UserError, match="one row alone"):
        generate_answers(chat_model, CONVERSATIONS[:1])


@pytest.mark.parametrize("said", ["shape mismatch", "an illegal memory access was encountered"])
def test_other_runtime_errors_are_not_swallowed(chat_model, monkeypatch, said):
    def begin(self):
        raise RuntimeError(said)

    monkeypatch.setattr(Decoding, "begin", begin)
    with pytest.raises(RuntimeError, match=said):
        generate_answers(chat_model, CONVERSATIONS)


def test_batches_are_announced_reported_and_counted(chat_model, told):
    prepared, finished = [], []
    with progress.stage("tokens"):
        generate_answers(
            chat_model,
            CONVERSATIONS,
            max_new_tokens=4,
            batch_size=2,
            prepare_batch=lambda rows: prepared.append(list(rows)),
            plan=RowPlan(
                on_batch=lambda rows, answers: finished.append((list(rows), len(answers)))
            ),
        )
    assert sorted(row for rows in prepared for row in rows) == list(range(5))
    assert prepared[0] == [3, 1]  # longest first
    assert finished == [(rows, len(rows)) for rows in prepared]
    assert told == sorted(told)
    stage, done, total = told[-1]
    assert stage == "tokens"
    assert done <= total == 5 * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_alike_share_the_beginning_of_their_prompts(chat_model, temperature):
    system = {"role": "system", "content": "Be brief and kind."}
    asked = [[system, *conversation] for conversation in CONVERSATIONS] * 2
    options = {"max_new_tokens": 12, "temperature": temperature}
    plain = generate_answers(chat_model, asked, **options)
    shapes, prefixes, batches = [], [], []
    decoder = chat_model.model.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda module, arguments, keywords: shapes.append(tuple(keywords["input_ids"].shape)),
        with_kwargs=True,
    )
    shared = generate_answers(
        chat_model,
        asked,
        plan=RowPlan(
            alike=["one"] * 5 + ["two"] * 5,
            prepare_prefix=lambda rows, length: prefixes.append((len(rows), length)),
            on_batch=lambda rows, _: batches.append(rows),
        ),
        **options,
    )
    handle.remove()
    assert shared == plain
    assert [{row // 5 for row in half} for half in (batches[0][:5], batches[0][5:])] == [{0}, {1}]
    beginning = chat_model.render(asked[0]).index("a<|im_end|>")
    assert len(prefixes) == 1
    rows, length = prefixes[0]
    assert rows == 2
    assert SHORTEST_PREFIX <= length <= beginning
    longest = len(chat_model.tokenizer(chat_model.render(asked[3]))["input_ids"])
    assert shapes[:2] == [(2, length), (10, longest - length)]


def test_nothing_is_shared_where_no_rows_are_alike_or_prompts_begin_differently(chat_model):
    def refuse(rows, length):
        raise AssertionError("a prefix was shared")

    unshared = RowPlan(alike=range(5), prepare_prefix=refuse)
    answers = generate_answers(chat_model, CONVERSATIONS, max_new_tokens=3, plan=unshared)
    assert answers == generate_answers(chat_model, CONVERSATIONS, max_new_tokens=3)
    unlike = [[{"role": role, "content": "x"}] for role in ("user", "assistant")]
    both = RowPlan(alike=[0, 0], prepare_prefix=refuse)
    generate_answers(chat_model, unlike, max_new_tokens=3, plan=both)


@pytest.mark.parametrize(
    ("rows", "prefix"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5]], [1, 2, 3]),
        ([[1, 2, 3, 4]] * 3, [1, 2, 3]),
        ([[1, 2, 9, 9, 9], [1, 3, 9, 9, 9], [1, 2, 9, 9, 9]], [1]),
        ([[7], [7]], []),
    ],
)
def test_the_common_prefix_leaves_a_token_of_each_row(rows, prefix):
    assert common_prefix(rows) == prefix


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_no_answer(chat_model, value, temperature):
    """Greedy decoding would take the token of a NaN; sampling would take the last of all."""
    head = chat_model.model.lm_head

    def poison(module, arguments, output):
        output[1, -1, 40] = value  # the second longest

    handle = head.register_forward_hook(poison)
    with pytest.raises(
        UserError, match=r"tiny in float32 gives NaN or infinity for row 1 \(.*a long"
    ):
        generate_answers(chat_model, CONVERSATIONS, max_new_tokens=2, temperature=temperature)
    handle.remove()
    generate_answers(chat_model, CONVERSATIONS, max_new_tokens=2, temperature=temperature)


def test_a_model_that_padding_may_change_answers_rows_of_one_length(chat_model, monkeypatch):
    monkeypatch.setattr(caches, "ATTENTION", ())
    monkeypatch.setattr(generation, "decodes", lambda model: False)
    lengths = []
    answers = generate_answers(
        chat_model,
        CONVERSATIONS * 2,
        max_new_tokens=3,
        plan=RowPlan(on_batch=lambda rows, _: lengths.append(sorted(rows))),
    )
    assert lengths == [[3, 8], [1, 6], [2, 7], [0, 4, 5, 9]]
    monkeypatch.undo()
    assert answers == generate_answers(chat_model, CONVERSATIONS * 2, max_new_tokens=3)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"batch_size": 0}]
)
def test_senseless_options_are_refused(chat_model, options):
    with pytest.raises(UserError):
        generate_answers(chat_model, CONVERSATIONS, **options)


def test_nothing_to_answer_is_an_error(chat_model):
    with pytest.raises(UserError, match="empty"):
        generate_answers(chat_model, [])


def test_an_answer_knows_whether_it_ended(chat_model, monkeypatch):
    ends = chat_model.tokenizer.eos_token_id
    letter = chat_model.tokenizer("x")["input_ids"][0]

    tail = torch.tensor([[letter, ends, 0], [letter, letter, letter]])

    def run(self, tokens, places):
        step = run.step = run.step + 1
        rows = tail[-len(tokens) :]  # the first leaves
        return torch.nn.functional.one_hot(rows[:, step], 1000).float()

    run.step = -1
    monkeypatch.setattr(Decoding, "_run", run)
    monkeypatch.setattr(Decoding, "keep", lambda self, order: None)
    first, second = generate_answers(chat_model, CONVERSATIONS[:1] * 2, max_new_tokens=3)
    assert (first.text, first.num_tokens, first.finished) == ("x", 1, True)
    assert (second.text, second.num_tokens, second.finished) == ("xxx", 3, False)


def test_a_turn_ends_an_answer_also_where_tokenizer_and_model_name_another_token(chat_model):
    chat_model.tokenizer.eos_token = "<|endoftext|>"
    chat_model.model.generation_config.eos_token_id = 0
    assert ending_tokens(chat_model) == {0, chat_model.tokenizer.get_vocab()["<|im_end|>"]}


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "falcon", "bloom", "mpt", "opt", "mamba", "lfm2"])
def test_the_automatic_batch_size_needs_no_configuration_of_one_kind(kind, tokenizer, monkeypatch):
    """Many configurations name no intermediate size, some no attention heads."""
    monkeypatch.setattr(generation, "free_memory", lambda device: 10**9)
    small = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 259}
    heads = {} if kind == "mamba" else {"num_attention_heads": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **heads))
    rows = [_affordable_rows(ChatModel(model, tokenizer, kind), n) for n in (64, 10**9)]
    assert 1 == rows[1] < rows[0] <= LARGEST_BATCH


SAID = Exchange("hi", "yes")
READERS = {
    "answers": lambda chat: generate_answers(chat, [user_question("hi")], max_new_tokens=2),
    "log-probabilities": lambda chat: mean_logprobs(chat, [SAID]),
    "next tokens": lambda chat: next_token_logprobs(chat, [("hi", "")]),
    "hidden states": lambda chat: list(stream_hidden_means(chat, [tokenize_exchange(chat, SAID)])),
    "inputs": lambda chat: measure_inputs(chat, ["hi"]),
    "the base": lambda chat: enter(chat.base()),
}


def enter(block):
    with block:
        pass


@pytest.mark.parametrize("reader", READERS)
def test_a_model_in_training_mode_neither_answers_nor_is_read(chat_model, reader):
    chat_model.model.train()
    with pytest.raises(UserError, match=r"call model\.eval\(\) first"):
        READERS[reader](chat_model)
    chat_model.model.eval()
    READERS[reader](chat_model)
    for dropout in (0.0, 0.5):  # the wrapper says that it trains, and around it all is as it was
        config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=dropout)
        wearing = replace(chat_model, model=get_peft_model(tiny_llama(), config))
        with pytest.raises(UserError, match="training mode") if dropout else nullcontext():
            READERS[reader](wearing)
