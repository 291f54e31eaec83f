"""Prompts and steps are told apart by counting, whatever a model calls its cache, or refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.caches import PassCounter, kept_cache
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.structure import decoder_layers
from persona_lora.steering.activations import ActivationSteerer
from tests.models.architectures import FAMILIES

TOKENS = torch.randint(3, 250, (2, 6), generator=torch.Generator().manual_seed(0))
NAMES = ("cache", "past_key_values")  # of this release of transformers, and of the last
LINEAR = ["linear_attention", "full_attention"]
VECTOR = SteeringVector({0: torch.arange(32.0)}, BaseModel("tiny"), num_layers=2)


class Renamed(LlamaDecoderLayer):
    """A block that gets its cache under a name that nobody has heard of, or by place."""

    def __call__(self, *arguments, **keywords):
        self.name = next(name for name in NAMES if name in keywords)
        return super().__call__(*arguments, memory=keywords.pop(self.name), **keywords)

    def forward(self, *arguments, memory=None, **keywords):
        return super().forward(*arguments, **{self.name: memory}, **keywords)


class Invisible(Renamed):
    """A block that finds its cache elsewhere: no argument holds one."""

    def __call__(self, *arguments, **keywords):
        self.name = next(name for name in NAMES if name in keywords)
        self.hidden = keywords.pop(self.name)
        return LlamaDecoderLayer.__call__(self, *arguments, **keywords)

    def forward(self, *arguments, **keywords):
        return LlamaDecoderLayer.forward(self, *arguments, **{self.name: self.hidden}, **keywords)


def disguise(model, kind):
    for block in decoder_layers(model):
        block.__class__ = kind
    return model


def generate(model, tokens, **settings):
    settings = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False, **settings}
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=GenerationConfig(**settings),
    )


def steered_lengths(model, run, positions):
    """What ``run`` returns, and by pass how many positions the first block's output moved."""
    moved = []

    def before(module, arguments, output):
        module.plain = output.clone()

    def after(module, arguments, output):
        moved.append(int((output != module.plain).any(-1).all(0).sum()))

    block = decoder_layers(model)[0]
    with ActivationSteerer(model, VECTOR, 0.1, positions=positions) as steerer:
        first = block.register_forward_hook(before, prepend=True)
        last = block.register_forward_hook(after)
        try:
            run(steerer)
        finally:
            first.remove()
            last.remove()
    return moved


@pytest.mark.parametrize("kind", [LlamaDecoderLayer, Renamed])
@pytest.mark.parametrize("length", [6, 1])
def test_a_plain_user_steers_prompts_and_answers_whatever_the_cache_is_called(model, kind, length):
    disguise(model, kind)

    def twice(steerer):
        generate(model, TOKENS[:, :length])
        generate(model, TOKENS[:, :length])

    assert steered_lengths(model, twice, "prompt") == [length, 0, 0, 0] * 2
    assert steered_lengths(model, twice, "response") == [1, 1, 1, 1] * 2
    assert steered_lengths(model, twice, "all") == [length, 1, 1, 1] * 2


@pytest.mark.parametrize("kind", [LlamaDecoderLayer, Renamed, Invisible])
@pytest.mark.parametrize("shared", [False, True])
def test_our_generation_says_where_prompts_begin(chat_model, kind, shared):
    """Also where all but the last token of the prompts is shared, and no cache is to be seen."""
    disguise(chat_model.model, kind)
    chat_model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    questions = [[{"role": "user", "content": f"a question {end}"}] for end in "abab"]
    length = len("a question a")

    def answer(steerer):
        generate_answers(
            chat_model,
            questions,
            max_new_tokens=3,
            prepare_batch=lambda rows: steerer.select_positions(None),
            plan=RowPlan(
                alike=[0] * 4 if shared else None,
                prepare_prefix=lambda rows, length: steerer.select_positions(
                    torch.zeros(1, length, dtype=torch.bool)
                ),
            ),
        )

    prompt = steered_lengths(chat_model.model, answer, "prompt")
    assert sum(prompt) == length
    assert len(prompt) == (4 if shared else 3)
    response = [0, 1] if shared else [1]
    assert steered_lengths(chat_model.model, answer, "response") == [*response, 1, 1]


@pytest.mark.parametrize("positions", ["prompt", "response"])
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LlamaDecoderLayer, {"prefill_chunk_size": 2}, "a prompt in chunks"),
        (LlamaDecoderLayer, {"prompt_lookup_num_tokens": 3}, "assisted generation"),
        (LlamaDecoderLayer, {"use_cache": False}, "use_cache=True"),
        (Invisible, {}, r"select_positions\(None\)"),
    ],
)
def test_what_cannot_be_told_is_refused(model, positions, kind, settings, message):
    disguise(model, kind)
    repeated = TOKENS[:1].repeat(1, 3)  # something for a look-up to find
    with (
        ActivationSteerer(model, VECTOR, positions=positions),
        pytest.raises(UserError, match=message),
    ):
        generate(model, repeated, max_new_tokens=20, **settings)
    with ActivationSteerer(model, VECTOR, positions="all"):
        generate(model, repeated, **settings)


@torch.no_grad()
def test_a_prompt_that_ran_before_the_block_is_no_prompt_of_it(model):
    name, cache = kept_cache(model(TOKENS[:, :5], use_cache=True))
    with (
        ActivationSteerer(model, VECTOR, positions="prompt"),
        pytest.raises(UserError, match="was begun before this block"),
    ):
        model(TOKENS[:, 5:], **{name: cache}, use_cache=True)


def test_texts_without_a_cache_are_prompts_each():
    passes = PassCounter()
    for length in (7, 7, 5, 9):
        passes.begin((), {"memory": None})
        assert passes.end(length) == "prompt"


class Silent(DynamicCache):
    """A cache that keeps what it holds where nobody can see it."""

    def get_seq_length(self, layer_idx=0):
        return 0

    @property
    def layers(self):
        return []

    @layers.setter
    def layers(self, layers):
        pass


def test_a_cache_that_stays_empty_tells_no_prompt_from_an_answer():
    """As of MiniMax with no layer of attention: states alone, which the cache does not name."""
    cache, passes = Silent(), PassCounter()
    for _ in range(2):  # told, every token is a step until the next prompt
        passes.expect_prompt()
        stages = []
        for length in (6, 1, 1):
            passes.begin((cache,), {})
            stages.append(passes.end(length))
        assert stages == ["prompt", "step", "step"]
    for length in (1, 6):
        passes = PassCounter()
        passes.begin((cache,), {})
        assert passes.end(6) == "prompt"
        passes.begin((cache,), {})
        with pytest.raises(UserError, match=r"does not say what it holds.*select_positions"):
            passes.end(length)


@pytest.mark.parametrize("layer_types", [LINEAR[:1] * 2, LINEAR, LINEAR[::-1]])
def test_layers_of_states_in_any_place_hide_no_step(layer_types):
    settings = FAMILIES["MiniMax"][1] | {"layer_types": layer_types}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("minimax", **settings)).eval()

    def run(steerer):
        generate(model, TOKENS)

    if "full_attention" in layer_types:
        assert steered_lengths(model, run, "prompt") == [6, 0, 0, 0]
        assert steered_lengths(model, run, "response") == [1, 1, 1, 1]
    else:
        for positions in ("prompt", "response"):
            with pytest.raises(UserError, match="does not say what it holds"):
                steered_lengths(model, run, positions)
    assert steered_lengths(model, run, "all") == [6, 1, 1, 1]
