"""What a GPU makes of models of 1B and 8B: steering, decoding, training, projecting.

    bash benchmarks/gpu.sh                       # about ten minutes on one large GPU
    bash benchmarks/gpu.sh --parts populations   # where time is short, one part after the other
    bash benchmarks/gpu.sh --dry-run             # a tiny model on this CPU, in seconds

The models have random weights of the usual shapes, made on the spot: nothing is downloaded, and
speed does not depend on what weights say. Everything that a ratio compares runs in turn in one
process. A table is printed after each part, and all is written as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from optimization import Mixes, population
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from training import measure, ours, plain_trl
from transformers import LlamaConfig, LlamaForCausalLM

from persona_lora.core.chat import user_question
from persona_lora.core.files import write_json
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, mix
from persona_lora.core.runs import package_versions
from persona_lora.core.traits import load_pairs, load_trait
from persona_lora.models.generation import RowPlan, generate_answers
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.models.structure import decoder_linear_modules, features
from persona_lora.projections.weight_space import project_adapter
from persona_lora.steering.weights import LoRASteerer

SHAPES = {  # hidden, intermediate, layers, heads, key and value heads
    "tiny": (64, 128, 2, 4, 2),
    "1B": (2048, 8192, 16, 32, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
PARTS = ("decoding", "projections", "training", "populations")
TRAITS, RANK = 5, 32
Found = Iterator[tuple[str, float, str]]  # what was measured, the value, its unit


def random_model(shape: str, device: str, dtype: torch.dtype) -> ChatModel:
    """Return a model of a shape with random weights, under the packaged model's tokenizer."""
    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    packaged = load_chat_model(dtype="float32")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=packaged.model.config.vocab_size,
        eos_token_id=packaged.tokenizer.eos_token_id,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
    return dataclasses.replace(packaged, model=model, name=shape)


def random_diffs(chat_model: ChatModel, *, family: bool) -> list[LoRADiff]:
    """Return a diff per trait over all linear modules; of a family all have the same A."""
    modules = decoder_linear_modules(chat_model.model)
    device, dtype = chat_model.model.device, chat_model.model.dtype
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*size: int, scale: float) -> torch.Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return (scale * values).to(dtype)

    down = {name: drawn(RANK, features(each)[1], scale=0.02) for name, each in modules.items()}
    return [
        LoRADiff(
            {
                name: LoRAFactors(
                    down[name] if family else drawn(*down[name].shape, scale=0.02),
                    drawn(features(each)[0], RANK, scale=0.01),
                )
                for name, each in modules.items()
            },
            BaseModel(chat_model.name, None),
            trait=f"trait{number}",
        )
        for number in range(TRAITS)
    ]


def seconds(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each variant; they alternate, after a round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            synchronize()
            start = time.perf_counter()
            variant()
            synchronize()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def of_populations(
    chat_model: ChatModel, folder: Path, candidates: int, tokens: int, rounds: int
) -> Found:
    """Compare a population in one batch with the loops that answer one candidate at a time."""
    own, family = (random_diffs(chat_model, family=each) for each in (False, True))
    prompts = [user_question(text) for text in load_trait("sycophancy").questions["eval"][:8]]
    random = torch.Generator().manual_seed(1)
    mixes: Mixes = torch.randn(candidates, TRAITS, generator=random).tolist()
    for number, diff in enumerate(own):
        diff.save(folder / f"{number}")

    def unsteered() -> object:
        return generate_answers(
            chat_model,
            prompts * candidates,
            max_new_tokens=tokens,
            plan=RowPlan(alike=[at // len(prompts) for at in range(candidates * len(prompts))]),
        )

    def merging() -> None:
        for weights in mixes:
            mixed = mix(dict(zip(own, weights, strict=True)))
            with LoRASteerer(chat_model.model, mixed, 1.0):
                generate_answers(chat_model, prompts, max_new_tokens=tokens)

    def set_scale(twin: ChatModel) -> None:
        for weights in mixes:
            for module in twin.model.modules():
                if isinstance(module, LoraLayer):
                    for number, value in enumerate(weights):
                        module.set_scale(f"{number}", value)
            generate_answers(twin, prompts, max_new_tokens=tokens)

    found = seconds(
        {
            "unsteered": unsteered,
            "live": lambda: population(chat_model, own, mixes, prompts, tokens),
            "live, one basis": lambda: population(chat_model, family, mixes, prompts, tokens),
            "merging loop": merging,
        },
        rounds,
    )
    # PEFT changes the modules of the very model that it wraps: its loop comes last.
    twin = dataclasses.replace(chat_model, model=with_adapters(chat_model, folder))
    found |= seconds({"set_scale loop": lambda: set_scale(twin)}, rounds)
    for name, each in found.items():
        yield f"{name}: rows a second", candidates * len(prompts) / each, ""
    for name in ("live", "live, one basis"):
        yield f"{name}: over unsteered", 100 * (found[name] / found["unsteered"] - 1), "%"
        for loop in ("merging loop", "set_scale loop"):
            yield f"{name}: times the {loop}", found[loop] / found[name], "×"


def with_adapters(chat_model: ChatModel, folder: Path) -> torch.nn.Module:
    model = PeftModel.from_pretrained(chat_model.model, folder / "0", adapter_name="0")
    for number in range(1, TRAITS):
        model.load_adapter(folder / f"{number}", adapter_name=f"{number}")
    model.base_model.set_adapter([f"{number}" for number in range(TRAITS)])
    return model.eval()


def of_decoding(chat_model: ChatModel, tokens: int, rounds: int) -> Found:
    """Tell which share of the memory's speed reading the weights once a token takes."""
    weights = sum(each.numel() * each.element_size() for each in chat_model.model.parameters())
    block = torch.zeros(min(weights, 2**30) // 4, device=chat_model.model.device)
    copied = seconds({"copy": block.clone}, rounds)["copy"]
    bandwidth = 2 * block.numel() * block.element_size() / copied
    yield "memory: copied", bandwidth / 2**30, "GiB/s"
    (question,) = load_trait("sycophancy").questions["eval"][:1]
    for rows in (1, 64):
        asked = [user_question(question)] * rows

        def decode(asked: list = asked) -> object:
            plan = RowPlan(endless=True)
            return generate_answers(chat_model, asked, max_new_tokens=tokens, plan=plan)

        step = seconds({"decode": decode}, rounds)["decode"] / tokens
        yield f"decoding, {rows} rows: tokens a second", rows / step, ""
        yield f"decoding, {rows} rows: of memory's speed", 100 * weights / step / bandwidth, "%"


def of_training(chat_model: ChatModel, steps: int, rounds: int) -> Found:
    """Compare training with plain TRL: time for a thousand tokens; the first round warms up."""
    pairs = load_pairs(load_trait("sycophancy"))[: 8 * steps]
    times: dict[str, list[float]] = {"plain TRL": [], "persona_lora": []}
    for number in range(rounds + 1):
        for name, build in (("plain TRL", plain_trl), ("persona_lora", ours)):
            step = measure(build, chat_model, pairs, max_steps=steps, seed=number)
            times[name].append(step["wall_per_1000_tokens"])
    found = {name: statistics.median(each[1:]) for name, each in times.items()}
    for name, each in found.items():
        yield f"training, {name}: tokens a second", 1000 / each, ""
    yield "training: times plain TRL", found["plain TRL"] / found["persona_lora"], "×"


def of_projections(chat_model: ChatModel, rounds: int) -> Found:
    """Compare projecting an adapter from its factors with forming the matrices."""
    adapter, *directions = random_diffs(chat_model, family=False)
    named = {str(at): each for at, each in enumerate(directions)}

    def dense() -> float:
        total = 0.0
        for name, factors in adapter.factors.items():
            change = factors.delta().float()
            total += sum(
                (change * each.factors[name].delta().float()).sum().item() for each in directions
            )
        return total

    found = seconds({"factors": lambda: project_adapter(adapter, named), "matrices": dense}, rounds)
    yield "projection, from factors: seconds", found["factors"], "s"
    yield "projection: times forming matrices", found["matrices"] / found["factors"], "×"


def measured(
    shape: str, device: str, dtype: torch.dtype, wanted: list[str], *, dry: bool
) -> Iterator[dict[str, float]]:
    """Run the wanted parts on one shape; after each, print its numbers and yield all so far."""
    tokens, rounds, steps = (4, 1, 2) if dry else (32, 3, 10)
    chat_model = random_model(shape, device, dtype)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Populations last: PEFT changes the modules of the model.
        parts = {
            "decoding": of_decoding(chat_model, tokens, rounds),
            "projections": of_projections(chat_model, rounds),
            "training": of_training(chat_model, steps, rounds),
            "populations": of_populations(
                chat_model, Path(folder), 2 if dry else 8, tokens, min(rounds, 2)
            ),
        }
        for part in (parts[name] for name in PARTS if name in wanted):
            table = Table(f"{shape}, {str(dtype).removeprefix('torch.')}", "")
            for name, value, unit in part:
                found[name] = value
                table.add_row(name, f"{value:,.2f} {unit}".strip())
            Console().print(table)
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["1B", "8B"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/gpu.json"))
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run tries every part on the CPU")
    device, dtype = ("cpu", torch.float32) if options.dry_run else ("cuda", torch.bfloat16)
    result: dict[str, object] = {
        "device": "cpu" if options.dry_run else torch.cuda.get_device_name(),
        "versions": package_versions(),
    }
    for shape in ["tiny"] if options.dry_run else options.shapes:
        for found in measured(shape, device, dtype, options.parts, dry=options.dry_run):
            result[shape] = found
            write_json(options.output, result)  # what fails or is taken away leaves what is done
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
