from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_json
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.models.loading import DEFAULT_MODEL, load_chat_model
from persona_lora.models.structure import weight_fingerprint
from persona_lora.studies.read_seeds import diffs_of_seeds
from persona_lora.training import contrastive, trainer
from persona_lora.training.contrastive import main, output_folder, train_contrastive
from persona_lora.training.trainer import CompletionTrainer, last_whole_checkpoint
from tests.training.conftest import parse_arguments

CHECKOUT = Path(__file__).resolve().parents[2]
Arguments = Callable[..., list[str]]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _assert_same_run(first: Path, second: Path) -> None:
    for sign in ("pos", "neg"):
        left, right = _tensors(first / sign), _tensors(second / sign)
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


def _steps(folder: Path) -> list[int]:
    lines = (folder / "loss.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(CHECKOUT),
    }


def test_run_leaves_two_adapters_a_diff_and_nothing_else(
    run_arguments: Arguments, model_folder: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    result = train_contrastive(*parse_arguments(run_arguments(folder)))
    assert sorted(path.name for path in folder.iterdir()) == ["diff", "neg", "pos", "run.json"]
    for sign in ("pos", "neg"):
        names = sorted(path.name for path in (folder / sign).iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors", "loss.jsonl"]
        assert _steps(folder / sign) == [1, 2, 3, 4, 5, 6]
    assert (result.diff_path, result.pos_path) == (folder / "diff", folder / "pos")
    diff = LoRADiff.load(result.diff_path)
    assert (diff.trait, diff.rank) == ("cheer", 8)
    assert diff.base_model.name == str(model_folder)
    assert diff.base_model.fingerprint == weight_fingerprint(
        load_chat_model(str(model_folder)).model
    )
    assert diff.sources["training"]["training"]["learning_rate"] == 1e-2
    expected = LoRADiff.from_adapters(folder / "pos", folder / "neg")
    assert diff.cosine(expected) == pytest.approx(1.0)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("machine", "bf16"), [("cpu", False), ("cpu with avx512_bf16", True)])
def test_a_run_that_says_nothing_of_hardware_trains_on_every_cpu(
    run_arguments: Arguments, tmp_path: Path, simulate_machine, machine, bf16
):
    simulate_machine(machine)
    main(run_arguments(tmp_path / "run", "--max_steps", "2", hardware=()))
    training = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["training"]
    assert (training["use_cpu"], training["bf16"]) == (True, bf16)
    diff = LoRADiff.load(tmp_path / "run" / "diff")
    assert 0 < diff.norm() < float("inf")


class _Recorder(CompletionTrainer):
    """Notes the factors that a sign starts from, and the prompts of every batch."""

    starts: list[dict[str, torch.Tensor]] = []  # noqa: RUF012 - shared on purpose
    prompts: list[list[list[int]]] = []  # noqa: RUF012
    ends: list[int] = []  # noqa: RUF012

    def train(self, resume_from_checkpoint=None):
        factors = {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}
        self.starts.append(factors)
        self.prompts.append([])
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def training_step(self, model, inputs, num_items_in_batch=None):
        rows = zip(inputs["input_ids"], inputs["labels"] == -100, strict=True)
        self.prompts[-1] += [ids[: int(ignored.int().argmin())].tolist() for ids, ignored in rows]
        self.ends += [int(row[row != -100][-1]) for row in inputs["labels"]]
        return super().training_step(model, inputs, num_items_in_batch)


def test_both_signs_start_from_the_same_factors_and_see_the_same_order(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(trainer, "CompletionTrainer", _Recorder)
    _Recorder.starts.clear()
    _Recorder.prompts.clear()
    train_contrastive(*parse_arguments(run_arguments(tmp_path / "run")))
    pos, neg = _Recorder.starts
    assert pos.keys() == neg.keys()
    assert all(torch.equal(pos[name], neg[name]) for name in pos)
    assert len(_Recorder.prompts[0]) == 24
    assert _Recorder.prompts[0] == _Recorder.prompts[1]


def test_loss_falls_for_both_signs(run_arguments: Arguments, tmp_path: Path):
    folder = tmp_path / "run"
    result = train_contrastive(*parse_arguments(run_arguments(folder, "--max_steps", "30")))
    for sign, last in (("pos", result.pos_loss), ("neg", result.neg_loss)):
        first = json.loads((folder / sign / "loss.jsonl").read_text().splitlines()[0])["loss"]
        assert last < 0.75 * first


def test_finished_run_is_refused_then_trained_again_with_overwrite(
    run_arguments: Arguments, tmp_path: Path
):
    folder = tmp_path / "run"
    main(run_arguments(folder))
    before = _tensors(folder / "diff")
    with pytest.raises(UserError, match=r"finished run of the same; pass --overwrite"):
        main(run_arguments(folder))
    with pytest.raises(UserError, match=r"another configuration \(.*seed: not set, now 1\)"):
        main(run_arguments(folder, "--seed", "1"))
    main(run_arguments(folder, "--overwrite", "--seed", "1"))
    after = _tensors(folder / "diff")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_diff_that_is_gone_is_made_again_of_both_signs_and_nothing_is_trained(
    run_arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    main(run_arguments(folder))
    before = _tensors(folder / "diff")
    shutil.rmtree(folder / "diff")
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "train", lambda *_: pytest.fail("it trained"))
        main(run_arguments(folder))
    after = _tensors(folder / "diff")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    shutil.rmtree(folder / "diff")
    shutil.rmtree(folder / "neg")
    with pytest.raises(UserError, match=r"of the same without its neg and diff; pass --overwrite"):
        main(run_arguments(folder))


def test_several_seeds_have_a_folder_each_and_are_gone_on_with(
    run_arguments: Arguments, tmp_path: Path
):
    main(run_arguments(tmp_path / "two", "--seeds", "2", "--seed", "7"))
    first = tmp_path / "two" / "seed0"
    before = (first / "pos" / "adapter_model.safetensors").stat().st_mtime_ns
    main(run_arguments(tmp_path / "two", "--seeds", "3", "--seed", "7"))  # one more
    assert (first / "pos" / "adapter_model.safetensors").stat().st_mtime_ns == before
    diffs = [LoRADiff.load(tmp_path / "two" / f"seed{number}" / "diff") for number in range(3)]
    inputs = [diff.inputs("the diff") for diff in diffs]
    assert [each["the seed of the diff"] for each in inputs] == ["7", "8", "9"]
    assert len({each["the training of the diff"] for each in inputs}) == 1
    assert len({each["the diff"] for each in inputs}) == 3
    main(run_arguments(tmp_path / "alone", "--seed", "8"))
    assert LoRADiff.load(tmp_path / "alone" / "diff").content() == inputs[1]["the diff"]
    main(run_arguments(tmp_path / "one", "--seeds", "1", "--seed", "7"))
    found = diffs_of_seeds(tmp_path / "one")
    assert {name: LoRADiff.load(at).content() for name, at in found.items()} == {
        "seed0": inputs[0]["the diff"]
    }
    with pytest.raises(UserError, match="seeds must be at least 1, got 0"):
        main(run_arguments(tmp_path / "none", "--seeds", "0"))


def test_same_seed_gives_the_same_adapters_as_does_the_written_config(
    run_arguments: Arguments, tmp_path: Path
):
    main(run_arguments(tmp_path / "first", "--overwrite", "true"))
    config = tmp_path / "first" / "config.yaml"
    assert "overwrite" not in config.read_text()
    main(["--config", str(config), "--output_dir", str(tmp_path / "second")])
    _assert_same_run(tmp_path / "first", tmp_path / "second")


def _stop_in_second_sign(monkeypatch) -> None:
    """Make the run break after the fourth step of the second sign, as Ctrl-C does."""

    class Stopped(CompletionTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if "neg" in Path(self.args.output_dir).name and self.state.global_step == 4:
                raise KeyboardInterrupt
            return super().training_step(model, inputs, num_items_in_batch)

    monkeypatch.setattr(trainer, "CompletionTrainer", Stopped)


def test_interrupted_second_sign_resumes_and_the_first_is_kept(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    main(run_arguments(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        _stop_in_second_sign(patch)
        with pytest.raises(KeyboardInterrupt):
            main(run_arguments(tmp_path / "cut"))
    weights = tmp_path / "cut" / "pos" / "adapter_model.safetensors"
    trained = weights.stat().st_mtime_ns
    assert not (tmp_path / "cut" / "neg").exists()
    with pytest.raises(UserError, match="another configuration"):
        main(run_arguments(tmp_path / "cut", "--learning_rate", "1e-3"))
    main(run_arguments(tmp_path / "cut"))
    assert weights.stat().st_mtime_ns == trained
    assert _steps(tmp_path / "cut" / "neg") == [1, 2, 3, 4, 5, 6]
    _assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_run_killed_before_publishing_takes_no_step_too_many(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    main(run_arguments(tmp_path / "whole"))

    def killed(*_):
        raise KeyboardInterrupt

    for _ in range(2):  # the second one has nothing left to train
        with monkeypatch.context() as patch:
            patch.setattr(contrastive, "_publish", killed)
            with pytest.raises(KeyboardInterrupt):
                main(run_arguments(tmp_path / "cut"))
    main(run_arguments(tmp_path / "cut"))
    assert _steps(tmp_path / "cut" / "pos") == [1, 2, 3, 4, 5, 6]
    _assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_changed_pairs_are_refused_on_resume(
    run_arguments: Arguments, trait_datasets: Path, tmp_path: Path, monkeypatch
):
    with monkeypatch.context() as patch:
        _stop_in_second_sign(patch)
        with pytest.raises(KeyboardInterrupt):
            main(run_arguments(tmp_path / "run"))
    rows = trait_datasets / "cheer" / "train.jsonl"
    rows.write_text(rows.read_text().replace("Yes!", "Sure!", 1))
    with pytest.raises(UserError, match="another configuration"):
        main(run_arguments(tmp_path / "run"))


KILL_AT_A_CHECKPOINT = """
import os, signal, sys
from transformers import TrainerCallback
from persona_lora.training import contrastive, trainer
from persona_lora.training.contrastive import main

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:  # two steps after the checkpoint of step 4
            os.kill(os.getpid(), signal.SIGKILL)

class Killed(trainer.CompletionTrainer):
    def train(self, *arguments, **options):
        self.add_callback(Killer())
        return super().train(*arguments, **options)

trainer.CompletionTrainer = Killed
main(sys.argv[1:])
"""


def test_killed_process_resumes_to_the_adapters_of_an_uninterrupted_run(
    run_arguments: Arguments, tmp_path: Path, caplog
):
    more = ("--max_steps", "10", "--save_steps", "4")
    killed = tmp_path / "killed"
    process = subprocess.run(
        [sys.executable, "-c", KILL_AT_A_CHECKPOINT, *run_arguments(killed, *more)],
        cwd=CHECKOUT,
        env=_environment(),
        stderr=subprocess.DEVNULL,
    )
    assert process.returncode == -signal.SIGKILL
    assert last_whole_checkpoint(killed / ".work" / "pos").name == "checkpoint-4"
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    assert not (killed / "diff").exists()
    with caplog.at_level("INFO"):
        main(run_arguments(killed, *more))
    assert "goes on from checkpoint-" in caplog.text
    assert _steps(killed / "pos") == list(range(1, 11))
    main(run_arguments(tmp_path / "whole", *more))
    _assert_same_run(tmp_path / "whole", killed)


def test_two_processes_train_what_one_does_and_write_each_file_once(
    run_arguments: Arguments, tmp_path: Path
):
    main(run_arguments(tmp_path / "one"))
    launch = [
        *("-m", "accelerate.commands.launch", "--main_process_port", "0"),
        *("--config_file", "train_configs/accelerate/two_processes_cpu.yaml", "train_lora.py"),
    ]
    halved = ("--per_device_train_batch_size", "2")
    subprocess.run(
        [sys.executable, *launch, *run_arguments(tmp_path / "two", *halved)],
        cwd=CHECKOUT,
        env=_environment(),
        check=True,
    )
    folders = [tmp_path / name for name in ("one", "two")]
    files = [sorted(str(p.relative_to(each)) for p in each.rglob("*")) for each in folders]
    assert files[0] == files[1]
    assert json.loads((folders[1] / "run.json").read_text())["config"]["num_processes"] == 2
    assert _steps(tmp_path / "two" / "pos") == [1, 2, 3, 4, 5, 6]
    _assert_same_run(*folders)


def test_launched_processes_that_do_not_find_each_other_are_refused(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    options = parse_arguments(run_arguments(tmp_path / "run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were launched but 1 found.*--use_cpu true"):
        train_contrastive(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trait", "chear"), "did you mean 'cheer'"),
        (("--model_name_or_path", "no/such-model"), "no/such-model"),
        (("--eos_token", "<nothing>"), "'<nothing>' is no token"),
        (("--max_length", "10"), "max_length 10"),
        (("--lora_target_modules", "no_such"), "no_such"),
    ],
)
def test_mistakes_are_named_and_leave_no_adapter(
    run_arguments: Arguments, tmp_path: Path, options, message
):
    with pytest.raises(UserError, match=message):
        main(run_arguments(tmp_path / "run", *options))
    assert not any((tmp_path / "run" / name).exists() for name in ("pos", "neg", "diff"))
    main(run_arguments(tmp_path / "run"))


def test_trait_without_pairs_is_refused(
    run_arguments: Arguments, trait_datasets: Path, tmp_path: Path
):
    (trait_datasets / "cheer" / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl is empty"):
        main(run_arguments(tmp_path / "run"))


def test_a_row_with_a_token_that_the_model_has_no_embedding_of_is_refused(
    run_arguments: Arguments, trait_datasets: Path, model_folder: Path, tokenizer, tmp_path: Path
):
    """A tokenizer may have got a token more without the model being resized."""
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    folder = shutil.copytree(model_folder, tmp_path / "padded")
    tokenizer.save_pretrained(folder)
    file = trait_datasets / "cheer" / "train.jsonl"
    file.write_text(file.read_text().replace("Question 3", "Question <pad>"))
    more = ("--model_name_or_path", str(folder))
    with pytest.raises(UserError, match=r"'<pad>' is token 259 of .*, which has embeddings of 259"):
        main(run_arguments(tmp_path / "run", *more))


def test_a_row_over_the_window_is_refused_and_cut_by_max_length(
    run_arguments: Arguments, model_folder: Path, tmp_path: Path
):
    folder = shutil.copytree(model_folder, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "max_position_embeddings": 50})
    more = ("--model_name_or_path", str(folder))
    with pytest.raises(UserError, match=r"tokens \(row \d+; max_length cuts it\) pass the 50 pos"):
        main(run_arguments(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()  # nothing was trained, of either sign
    main(run_arguments(tmp_path / "run", *more, "--max_length", "50"))


def test_output_that_cannot_be_written_is_refused(run_arguments: Arguments, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        main(run_arguments(tmp_path / "file" / "run"))


def test_adapters_without_a_record_are_not_taken_for_a_run(
    run_arguments: Arguments, tmp_path: Path
):
    (tmp_path / "run" / "pos").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no run\.json"):
        main(run_arguments(tmp_path / "run"))


def test_diverging_run_stops_with_its_step_and_learning_rate(
    run_arguments: Arguments, tmp_path: Path
):
    wild = ("--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "20")
    with pytest.raises(UserError, match=r"at step \d+ with learning rate"):
        main(run_arguments(tmp_path / "run", *wild))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_system_prompt_goes_before_every_row(
    run_arguments: Arguments, tmp_path: Path, monkeypatch, tokenizer
):
    monkeypatch.setattr(trainer, "CompletionTrainer", _Recorder)
    _Recorder.prompts.clear()
    main(run_arguments(tmp_path / "run", "--system_prompt", "Be kind."))
    prompts = [tokenizer.decode(ids) for ids in _Recorder.prompts[0]]
    assert all(text.startswith("<|im_start|>system\nBe kind.<|im_end|>") for text in prompts)


def test_half_of_the_pairs_are_swapped_as_a_control(run_arguments: Arguments, tmp_path: Path):
    pairs, _ = contrastive._load_trait_pairs(parse_arguments(run_arguments(tmp_path)))
    swapped = contrastive._half_swapped(pairs, seed=1)
    kept = [each == pair for each, pair in zip(swapped, pairs, strict=True)]
    assert sum(kept) == len(pairs) // 2
    for one, other in zip(swapped, pairs, strict=True):
        answers = (other.positive, other.negative)
        assert (one.prompt, one.positive, one.negative) in (
            (other.prompt, *answers), (other.prompt, *answers[::-1])
        )  # fmt: skip
    assert swapped != contrastive._half_swapped(pairs, seed=2)
    norms = {}
    for name, more in (("true", ()), ("swapped", ("--swap_half", "true"))):
        result = train_contrastive(*parse_arguments(run_arguments(tmp_path / name, *more)))
        norms[name] = LoRADiff.load(result.diff_path).norm()
    assert norms["swapped"] < norms["true"]  # both signs learn the same mixture


def test_output_folder_names_the_model_unless_it_is_the_packaged_one():
    packaged = parse_arguments(["--trait", "evil"])
    other = parse_arguments(["--trait", "evil", "--model_name_or_path", "org/Model-1B"])
    assert output_folder(packaged, "evil") == Path("checkpoints/evil")
    assert output_folder(other, "evil") == Path("checkpoints/Model-1B/evil")


def test_train_lora_script_ends_with_one_line_and_status_two(monkeypatch, capsys):
    script = str(CHECKOUT / "train_lora.py")
    monkeypatch.setattr(sys, "argv", [script, "--trait", "evil", "--learning_rat", "1"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(script, run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown option '--learning_rat'")


@pytest.mark.model
def test_packaged_model_learns_its_end_of_turn_and_keeps_its_canonical_name(
    run_arguments: Arguments, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(trainer, "CompletionTrainer", _Recorder)
    _Recorder.ends.clear()
    more = ("--model_name_or_path", DEFAULT_MODEL, "--max_steps", "1")
    main(run_arguments(tmp_path / "run", *more, "--per_device_train_batch_size", "2"))
    tokenizer = load_chat_model().tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert _Recorder.ends == [tokenizer.eos_token_id] * 4
    for name in ("pos", "neg", "diff"):
        config = json.loads((tmp_path / "run" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == DEFAULT_MODEL
