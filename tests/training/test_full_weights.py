"""Contrastive training of whole weights: what is trained, and that the diff is the closest one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.models.loading import load_chat_model
from persona_lora.steering.weights import LoRASteerer
from persona_lora.training import contrastive, trainer
from persona_lora.training.contrastive import main
from persona_lora.training.full_weights import cut_difference, near_factors
from persona_lora.training.trainer import CompletionTrainer
from tests.conftest import byte_tokenizer
from tests.models.architectures import tiny_model

Arguments = Callable[..., list[str]]
IN_FULL = ("--use_peft", "false", "--learning_rate", "1e-3")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_chat_model(str(folder), dtype="float32").model.state_dict()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_closest_factors_are_those_of_the_singular_vectors(shape, rank):
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(rank))
    found = near_factors(delta, rank)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    closest = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(found.B @ found.A, closest, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.A @ found.A.T, torch.eye(rank), atol=1e-5, rtol=0)


def test_factors_of_a_matrix_of_lower_rank_than_asked_are_exact_and_finite():
    for delta in (torch.ones(3, 8), torch.ones(8, 3), torch.zeros(4, 6)):
        found = near_factors(delta, 3)
        torch.testing.assert_close(found.B @ found.A, delta, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.A @ found.A.T, torch.eye(3), atol=1e-6, rtol=0)


def test_a_large_flat_matrix_keeps_what_it_can_and_the_same_each_time():
    delta = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    found, again = near_factors(delta, 20), near_factors(delta, 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.B, again.B)
    most = torch.linalg.svdvals(delta)[:20].square().sum()
    assert 0.999 * most < found.B.square().sum() <= 1.0001 * most
    left = delta - found.B @ found.A
    assert float(left.square().sum() + found.B.square().sum()) == pytest.approx(
        float(delta.square().sum()), rel=1e-4
    )


def test_two_models_are_trained_and_their_difference_is_cut(
    run_arguments: Arguments, tmp_path: Path, model_folder: Path, caplog
):
    folder = tmp_path / "run"
    with caplog.at_level("INFO"):
        main(run_arguments(folder, *IN_FULL))
    assert {"diff", "neg", "pos", "run.json"} <= {path.name for path in folder.iterdir()}
    base, pos, neg = _weights(model_folder), _weights(folder / "pos"), _weights(folder / "neg")
    diff = LoRADiff.load(folder / "diff")
    assert diff.trait == "cheer"
    trained = {f"{name}.weight" for name in diff.factors}
    for name, value in base.items():  # embeddings and norms, which a diff cannot hold, stay
        moved = [not torch.equal(side[name], value) for side in (pos, neg)]
        assert moved == [name in trained] * 2, name
    kept = total = 0.0
    for name, factors in diff.factors.items():
        delta = pos[f"{name}.weight"].double() - neg[f"{name}.weight"].double()
        assert factors.rank == 4
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        closest = (left[:, :4] * values[:4]) @ right[:4]
        torch.testing.assert_close(factors.delta().double(), closest, atol=1e-6, rtol=1e-4)
        kept, total = kept + float(values[:4].square().sum()), total + float(delta.square().sum())
    assert 0.1 < kept / total < 0.999
    assert diff.sources["kept"] == pytest.approx(kept / total, rel=1e-5)
    assert f"rank 4 keeps {100 * kept / total:.1f}% of the squared difference" in caplog.text
    for sign in ("pos", "neg"):
        losses = [json.loads(line)["loss"] for line in (folder / sign / "loss.jsonl").open()]
        assert losses[-1] < losses[0]
    assert diff.inputs("it")["the seed of it"] == "42"


def test_a_killed_second_model_goes_on_and_a_diff_that_is_gone_is_made_again(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    main(run_arguments(tmp_path / "whole", *IN_FULL))

    class Stopped(CompletionTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if "neg" in Path(self.args.output_dir).name and self.state.global_step == 4:
                raise KeyboardInterrupt
            return super().training_step(model, inputs, num_items_in_batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "CompletionTrainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            main(run_arguments(tmp_path / "cut", *IN_FULL))
    with pytest.raises(UserError, match="another configuration"):
        main(run_arguments(tmp_path / "cut", "--learning_rate", "1e-3"))  # LoRAs
    main(run_arguments(tmp_path / "cut", *IN_FULL))
    for sign in ("pos", "neg"):
        whole, cut = _weights(tmp_path / "whole" / sign), _weights(tmp_path / "cut" / sign)
        for name in whole:
            torch.testing.assert_close(whole[name], cut[name], rtol=1e-4, atol=1e-6)
    before = LoRADiff.load(tmp_path / "cut" / "diff")
    shutil.rmtree(tmp_path / "cut" / "diff")
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "train", lambda *_: pytest.fail("it trained"))
        main(run_arguments(tmp_path / "cut", *IN_FULL))
    assert LoRADiff.load(tmp_path / "cut" / "diff").content() == before.content()


def test_the_second_model_starts_where_the_first_did_and_is_loaded_once(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    main(run_arguments(tmp_path / "whole", *IN_FULL))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for gone in ("neg", "diff"):
        shutil.rmtree(tmp_path / "half" / gone)
    record = tmp_path / "half" / "run.json"  # as it is after a kill between the two
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    loads, load = [], contrastive.load_model
    monkeypatch.setattr(contrastive, "load_model", lambda *a: loads.append(a) or load(*a))
    main(run_arguments(tmp_path / "half", *IN_FULL))
    assert len(loads) == 1
    whole, alone = (_weights(tmp_path / name / "neg") for name in ("whole", "half"))
    for name in whole:
        torch.testing.assert_close(whole[name], alone[name], rtol=1e-4, atol=1e-6)


def test_weights_are_trained_in_fp32_whatever_the_base_is_saved_in(
    run_arguments: Arguments, model_folder: Path, tmp_path: Path
):
    half = shutil.copytree(model_folder, tmp_path / "half")
    load_chat_model(str(model_folder), dtype="bfloat16").model.save_pretrained(half)
    arguments = run_arguments(tmp_path / "run", *IN_FULL, "--model_name_or_path", str(half))
    arguments[arguments.index("float32")] = "auto"
    main([*arguments, "--max_steps", "2", "--save_strategy", "no"])
    tensors = load_file(tmp_path / "run" / "pos" / "model.safetensors")
    assert {each.dtype for each in tensors.values()} == {torch.float32}


def test_what_does_nothing_is_no_part_of_the_record(run_arguments: Arguments, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text("lora_alpha: 8\nlora_dropout: 0.3\n")  # of a file for LoRAs
    quick = (*IN_FULL, "--max_steps", "2", "--save_strategy", "no")
    main(["--config", str(config), *run_arguments(tmp_path / "run", *quick)])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["lora"] == {"lora_r": 4, "lora_target_modules": ["all-linear"]}


def test_a_diff_that_is_cut_further_says_what_it_keeps_of_the_whole(tmp_path: Path):
    factors = {"model.layers.0.x": near_factors(torch.diag(torch.tensor([3.0, 1.0])), 2)}
    diff = LoRADiff(factors, BaseModel("m"), "t", {"kept": 0.5})
    assert diff.compress(rank=1).diff.sources["kept"] == pytest.approx(0.45)
    roots = {"model.layers.0.x": torch.eye(2)}
    assert diff.compress(rank=1, roots=roots).diff.sources["kept"] is None


@pytest.mark.parametrize("family", ["GPT-2", "Qwen2.5-VL"])
def test_a_cut_difference_fits_models_of_another_build(
    run_arguments: Arguments, tmp_path: Path, family: str
):
    base = tmp_path / "base"
    tiny_model(family).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    run = tmp_path / "run"
    main(
        run_arguments(run, *IN_FULL, "--model_name_or_path", str(base), "--max_steps", "2")
        + ["--lora_r", "512", "--save_strategy", "no"]  # of a rank that cuts nothing
    )
    neg, pos = (load_chat_model(str(run / sign), dtype="float32").model for sign in ("neg", "pos"))
    tokens = torch.arange(40, 50)[None]
    wanted = pos(tokens).logits
    assert not torch.allclose(neg(tokens).logits, wanted, atol=1e-4)
    diff = LoRADiff.load(run / "diff")
    with LoRASteerer(neg, diff, 1.0, allow_other_base=True):
        torch.testing.assert_close(neg(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


def test_what_weights_in_full_cannot_have_is_refused(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    run = tmp_path / "run"
    for more, message in (
        (("--quantize", "4bit"), "quantised weights cannot be trained"),
        (("--family", str(tmp_path / "f.safetensors")), "share no A; leave family out"),
        (("--lora_alpha", "8"), "lora_alpha does nothing: weights are trained in full"),
    ):
        with pytest.raises(UserError, match=message):
            main(run_arguments(run, *IN_FULL, *more))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"have not been shown .* train LoRAs"):
        main(run_arguments(run, *IN_FULL))
    assert not run.exists()


def test_equal_models_have_no_difference(model_folder: Path):
    with pytest.raises(UserError, match="hold the same weights"):
        cut_difference(model_folder, model_folder, ["model.layers.0.self_attn.q_proj"], 2)
