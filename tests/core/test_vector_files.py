"""Every file form of a steering vector means the same layers, by round trip and by hook."""

from __future__ import annotations

import gguf
import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.vector_files import (
    load_vector,
    write_gguf,
    write_lm_eval,
    write_published,
)
from persona_lora.steering.activations import ActivationSteerer

TOKENS = torch.tensor([[5, 9, 17, 30]])


def make_vector(layers=(0, 1), *, num_layers=2, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(32, generator=generator) for layer in layers}
    return SteeringVector(directions, BaseModel("tiny", "f" * 32), num_layers, **fields)


def assert_same_directions(one, other):
    assert one.layers == other.layers
    assert one.num_layers == other.num_layers
    for layer in one.layers:
        assert torch.equal(one.directions[layer], other.directions[layer])


def test_our_own_form_is_read_with_all_that_it_knows(tmp_path):
    vector = make_vector(trait="evil", position="prompt_avg", sources={"n": 3})
    read = load_vector(vector.save(tmp_path / "v.safetensors"))
    assert_same_directions(read, vector)
    assert (read.trait, read.position, read.sources) == ("evil", "prompt_avg", {"n": 3})
    assert read.base_model == vector.base_model


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (3,), (0, 2)])
def test_the_published_form_comes_back_layer_by_layer(tmp_path, layers):
    vector = make_vector(layers, num_layers=4)
    path = write_published(vector, tmp_path / "kind_prompt_last_diff.pt")
    stored = torch.load(path, weights_only=True)
    assert stored.shape == (5, 32)
    assert not stored[0].any()
    for layer in layers:
        assert torch.equal(stored[layer + 1], vector.directions[layer])
    read = load_vector(path)
    assert_same_directions(read, vector)
    assert (read.trait, read.position) == ("kind", "prompt_last")
    assert read.base_model == BaseModel("", None)


def test_a_published_file_of_others_loses_its_embedding_row(tmp_path):
    stored = torch.randn(4, 32, dtype=torch.float16)
    torch.save(stored, tmp_path / "mine.pt")
    read = load_vector(tmp_path / "mine.pt")
    assert (read.num_layers, read.layers) == (3, (0, 1, 2))
    assert torch.equal(read.directions[0], stored[1].float())
    assert read.trait is None


def add(vector):
    def hook(module, arguments, output):
        return output + vector

    return hook


@torch.no_grad()
def logits_with(model, block, vector):
    handle = model.model.layers[block].register_forward_hook(add(vector))
    logits = model(TOKENS).logits
    handle.remove()
    return logits


@torch.no_grad()
def test_layer_one_is_the_same_block_in_every_form(model, tmp_path):
    vector = make_vector()
    with ActivationSteerer(model, vector, 1.5, layers=1, positions="all", allow_other_base=True):
        expected = model(TOKENS).logits

    published = torch.load(write_published(vector, tmp_path / "v.pt"), weights_only=True)
    # as the public steering code does it: it hooks layers[layer − 1] for row ``layer``
    torch.testing.assert_close(logits_with(model, 2 - 1, 1.5 * published[2]), expected)

    assert write_gguf(vector, tmp_path / "v.gguf", model_hint="llama") == (1,)
    tensors = {each.name: each.data for each in gguf.GGUFReader(tmp_path / "v.gguf").tensors}
    # as llama.cpp does it: direction.N is added to the output of block N
    direction = torch.from_numpy(tensors["direction.1"].copy())
    torch.testing.assert_close(logits_with(model, 1, 1.5 * direction), expected)

    path = write_lm_eval(vector, tmp_path / "steer.pt", layers=[1], coefficient=1.5)
    handles = []  # as lm-evaluation-harness does it: by name inside the model without its head
    for name, entry in torch.load(path, weights_only=True).items():
        module = model.base_model.get_submodule(name)
        delta = entry["steering_vector"] * entry["steering_coefficient"]
        handles.append(module.register_forward_hook(add(delta)))
    torch.testing.assert_close(model(TOKENS).logits, expected)
    for handle in handles:
        handle.remove()


def test_gguf_holds_what_llama_cpp_looks_for(tmp_path):
    vector = make_vector((0, 1, 3), num_layers=4)
    assert write_gguf(vector, tmp_path / "v.gguf", model_hint="llama") == (1, 3)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert [each.name for each in reader.tensors] == ["direction.1", "direction.3"]
    for each, layer in zip(reader.tensors, (1, 3), strict=True):
        assert each.data.dtype == "float32"
        assert torch.equal(torch.from_numpy(each.data.copy()), vector.directions[layer])


def test_lm_eval_entries_have_the_keys_of_its_steered_model(tmp_path):
    vector = make_vector((0, 1, 3), num_layers=4)
    path = write_lm_eval(vector, tmp_path / "v.pt", layers=[0, 3], coefficient=-2, blocks="h")
    entries = torch.load(path, weights_only=True)
    assert list(entries) == ["h.0", "h.3"]
    assert torch.equal(entries["h.3"]["steering_vector"], vector.directions[3])
    rest = {key: each for key, each in entries["h.3"].items() if key != "steering_vector"}
    assert rest == {
        "steering_coefficient": -2.0, "action": "add", "bias": None, "head_index": None,
    }  # fmt: skip


def test_what_a_form_cannot_say_is_refused_and_nothing_is_written(tmp_path):
    vector = make_vector((0,), num_layers=2)
    with pytest.raises(UserError, match=r"llama\.cpp has no control vector for layer 0"):
        write_gguf(vector, tmp_path / "v.gguf", model_hint="llama")
    with pytest.raises(UserError, match="no layer 1"):
        write_lm_eval(vector, tmp_path / "v.pt", layers=[1], coefficient=1.0)
    with pytest.raises(UserError, match="finite"):
        write_lm_eval(vector, tmp_path / "v.pt", layers=[0], coefficient=float("nan"))
    with pytest.raises(UserError, match=r"saved as \.pt"):
        write_published(vector, tmp_path / "v.bin")
    assert list(tmp_path.iterdir()) == []


def broken_files(folder):
    torch.save(torch.ones(3, 32), folder / "whole.pt")
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:-200])
    (folder / "text.pt").write_text("no tensors here")
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"a": torch.ones(2)}, folder / "dict.pt")
    torch.save(torch.ones(3), folder / "flat.pt")
    torch.save(torch.zeros(3, 32), folder / "zero.pt")
    torch.save(torch.full((3, 32), torch.nan), folder / "nan.pt")
    (folder / "v.npz").write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cut.pt", "truncated"),
        ("text.pt", "truncated or no file of tensors"),
        ("empty.pt", "truncated"),
        ("dict.pt", r"holds dict; expected one tensor"),
        ("flat.pt", r"holds \[3\]"),
        ("zero.pt", "without layers"),
        ("nan.pt", "NaN"),
        ("v.npz", "no vector file"),
        ("v.txt", "no vector file"),
        ("nowhere.pt", "does not exist"),
        ("nowhere.safetensors", "does not exist"),
    ],
)
def test_a_file_that_holds_no_vector_is_named(tmp_path, name, expected):
    broken_files(tmp_path)
    with pytest.raises(UserError, match=f"{name}.*{expected}"):
        load_vector(tmp_path / name)


def test_an_object_in_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(Trap(), tmp_path / "trap.pt")
    with pytest.raises(UserError, match=r"trap\.pt"):
        load_vector(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


def test_vectors_of_other_weights_do_not_mix():
    def vector(fingerprint):
        return SteeringVector({0: torch.ones(4)}, BaseModel("m", fingerprint), 2)

    for change in (lambda a, b: a + b, lambda a, b: a - b):
        with pytest.raises(UserError, match="steering vectors of different base models"):
            change(vector("a"), vector("b"))
        assert change(vector(None), vector("b")).base_model.fingerprint == "b"
    vector("a").cosine(vector(None))
    with pytest.raises(UserError, match="steering vectors of different base models"):
        vector("a").cosine(vector("b"))
    assert vector("a").cosine(vector("b"), allow_other_base=True) == {0: 1.0}


def test_a_cosine_of_vectors_is_one_of_two_directions_and_stays_within_one():
    for seed in range(100):
        vector = make_vector(seed=seed)
        assert all(1 - 1e-12 < each <= 1 for each in vector.cosine(vector).values())
        assert all(-1 <= each < -1 + 1e-12 for each in vector.cosine(-vector).values())
    first = make_vector((0,))
    for other, message in (
        (make_vector((1,)), "different layers"),
        (first * 0.0, "length 0"),
        (make_vector((0,), num_layers=3), "different shape"),
        ("path", "a steering vector is expected"),
    ):
        with pytest.raises(UserError, match=message):
            first.cosine(other)
