"""A family: one frozen A per module for both signs of every trait; their mixes keep its rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json
from persona_lora.core.lora_diff import LoRADiff, mix
from persona_lora.core.runs import Run
from persona_lora.models.loading import load_chat_model
from persona_lora.projections import inputs
from persona_lora.training import family, trainer
from persona_lora.training import lora as lora_module
from persona_lora.training.contrastive import main
from persona_lora.training.family import Family
from persona_lora.training.lora import LoRAArguments
from persona_lora.training.trainer import CompletionTrainer

Arguments = Callable[..., list[str]]


def _factors(folder: Path, side: str) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: each for name, each in tensors.items() if f"lora_{side}" in name}


def _dense(folder: Path) -> dict[str, torch.Tensor]:
    diff = LoRADiff.load(folder)
    return {name: each.B.double() @ each.A.double() for name, each in diff.factors.items()}


def test_signs_and_traits_share_A_and_their_mix_keeps_the_rank(
    run_arguments: Arguments, model_folder: Path, tmp_path: Path
):
    family = tmp_path / "base.safetensors"
    for number in range(3):
        main(
            run_arguments(
                tmp_path / f"run{number}",
                *("--family", str(family), "--seed", str(number), "--max_steps", "2"),
            )
        )
    A = load_file(family)
    diffs = []
    for number in range(3):
        run = tmp_path / f"run{number}"
        for part in ("pos", "neg", "diff"):
            held = _factors(run / part, "A")
            assert len(held) == len(A)
            for name, each in held.items():
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                assert torch.equal(each, A[module])
        pos, neg, diff = (_dense(run / part) for part in ("pos", "neg", "diff"))
        for name in diff:
            torch.testing.assert_close(diff[name], pos[name] - neg[name], rtol=1e-5, atol=1e-8)
            assert diff[name].any()
        diffs.append(LoRADiff.load(run / "diff"))
    mixed = mix(dict(zip(diffs, (1.0, -0.5, 2.0), strict=True)))
    assert [each.rank for each in (*diffs, mixed)] == [4, 4, 4, 4]
    model = load_chat_model(str(model_folder), dtype="float32").model
    wrapped = PeftModel.from_pretrained(model, mixed.save(tmp_path / "mix"))
    assert torch.isfinite(wrapped(torch.tensor([[3, 4, 5]])).logits).all()


def test_a_resumed_sign_leaves_A_frozen(run_arguments: Arguments, tmp_path: Path, monkeypatch):
    class Stopped(CompletionTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return super().training_step(model, inputs, num_items_in_batch)

    family = ("--family", str(tmp_path / "base.safetensors"))
    main(run_arguments(tmp_path / "whole", *family))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "CompletionTrainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            main(run_arguments(tmp_path / "cut", *family))
    main(run_arguments(tmp_path / "cut", *family))
    for sign in ("pos", "neg"):
        one, two = (_factors(tmp_path / run / sign, "A") for run in ("whole", "cut"))
        assert all(torch.equal(one[name], two[name]) for name in one)
        one, two = (_factors(tmp_path / run / sign, "B") for run in ("whole", "cut"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_A_leads_with_the_inputs_of_the_model(
    run_arguments: Arguments, model_folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(inputs, "user_cache_path", lambda _: tmp_path / "cache")
    path = tmp_path / "base.safetensors"
    named = ("--family", str(path), "--family_inputs", "true", "--max_steps", "1")
    main(run_arguments(tmp_path / "run", *named))
    chat_model = load_chat_model(str(model_folder), dtype="float32")
    measured = inputs.measure_inputs(chat_model, inputs.load_ordinary_prompts())
    for name, A in Family.load(path).factors.items():
        root = measured.root(name, A.shape[1]).double()
        seen = A.double() @ root @ root.T @ A.double().T  # E[(A x)(A x)ᵀ]
        usual = root.square().sum() / (3 * A.shape[1])
        torch.testing.assert_close(seen, torch.eye(4).double() * usual, rtol=1e-4, atol=1e-4)
        leading = torch.linalg.svd(root)[0][:, :4]
        kept = (A.double() @ leading).square().sum() / A.double().square().sum()
        assert float(kept) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--lora_r", "2"), r"family of rank 4, the run has lora_r 2; pass --lora_r 4, or name"),
        (("--lora_target_modules", "q_proj"), "other target modules .* or name a file"),
        (("--family_inputs", "true"), "drawn from seed 42, not from inputs; leave family_inputs"),
    ],
)
def test_a_family_of_another_kind_is_refused_before_training(
    run_arguments: Arguments, tmp_path: Path, change, message
):
    family = ("--family", str(tmp_path / "base.safetensors"))
    main(run_arguments(tmp_path / "first", *family, "--max_steps", "1"))
    with pytest.raises(UserError, match=message):
        main(run_arguments(tmp_path / "run", *family, *change))
    assert not (tmp_path / "run").exists()


def test_a_family_of_another_base_and_another_file_are_refused(
    run_arguments: Arguments, tmp_path: Path
):
    path = tmp_path / "base.safetensors"
    family = ("--family", str(path), "--max_steps", "1")
    main(run_arguments(tmp_path / "first", *family))
    held = Family.load(path)
    Family(held.factors, type(held.base_model)("other", "0" * 32), held.origin).save(path)
    with pytest.raises(UserError, match=r"a family of 'other' of other weights .* is drawn"):
        main(run_arguments(tmp_path / "run", *family))
    save_file({"model.x": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="holds no family; name a file"):
        main(run_arguments(tmp_path / "run", *family))
    with pytest.raises(UserError, match="name its file with --family"):
        main(run_arguments(tmp_path / "run", "--family_inputs", "true"))


def test_another_A_is_another_run(run_arguments: Arguments, tmp_path: Path):
    path = tmp_path / "base.safetensors"
    words = ("--family", str(path), "--max_steps", "1")
    main(run_arguments(tmp_path / "run", *words))
    write_json(tmp_path / "run" / "run.json", {**Run(tmp_path / "run").record, "status": "running"})
    path.unlink()
    main(run_arguments(tmp_path / "other", *words, "--seed", "3"))
    with pytest.raises(UserError, match=r"another configuration .*family"):
        main(run_arguments(tmp_path / "run", *words))


def test_two_runs_at_once_draw_one_family(chat_model, tmp_path: Path, monkeypatch):
    draw = family._draw

    def slowly(*arguments):
        time.sleep(0.3)
        return draw(*arguments)

    monkeypatch.setattr(family, "_draw", slowly)
    lora = LoRAArguments(lora_r=2, lora_target_modules=["q_proj"])

    def opened(seed: int) -> str:
        path = tmp_path / "base.safetensors"
        return family.open_family(path, chat_model, lora, seed=seed, by_inputs=False).content()

    inside, most = [], []
    wrap = lora_module.get_peft_model

    def watched(*arguments, **options):
        inside.append(1)  # PEFT replaces nn.Module.register_parameter for all threads meanwhile
        most.append(len(inside))
        time.sleep(0.1)
        try:
            return wrap(*arguments, **options)
        finally:
            inside.pop()

    monkeypatch.setattr(lora_module, "get_peft_model", watched)
    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(opened, range(3)))) == 1
    assert (len(most), max(most)) == (3, 1)
