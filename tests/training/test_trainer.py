from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    OPTConfig,
    TrainerControl,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.models.loading import ChatModel
from persona_lora.training.lora import LoRAArguments, attach_lora
from persona_lora.training.trainer import (
    CheckpointMark,
    CompletionTrainer,
    LossLog,
    completion_log_probs,
    last_whole_checkpoint,
    shared_prefix_length,
)

SHARED = [3, 4, 5, 6, 7, 8]
ROWS = [([9, 10], [11, 12, 2]), ([13], [14, 15, 16, 17, 2]), ([18, 19, 20], [21, 2])]


@pytest.fixture
def peft_model(model, tokenizer) -> PeftModel:
    peft_model = attach_lora(ChatModel(model, tokenizer, "tiny"), LoRAArguments(lora_r=4), seed=0)
    for name, each in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(each, std=0.1)
    return peft_model


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three right-padded rows with a common beginning."""
    rows = [(SHARED + prompt, completion) for prompt, completion in ROWS]
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    width = [longest - len(prompt) - len(completion) for prompt, completion in rows]
    ids = [p + c + [0] * pad for (p, c), pad in zip(rows, width, strict=True)]
    labels = [[-100] * len(p) + c + [-100] * pad for (p, c), pad in zip(rows, width, strict=True)]
    mask = [[1] * (longest - pad) + [0] * pad for pad in width]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


def _naive_log_probs(model: nn.Module) -> Tensor:
    """One row at a time, the whole vocabulary everywhere."""
    found = []
    for prompt, completion in ROWS:
        ids = torch.tensor([SHARED + prompt + completion])
        log_probs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
        start = ids.shape[1] - len(completion)
        found += [log_probs[start + index - 1, token] for index, token in enumerate(completion)]
    return torch.stack(found)


def _assert_same_gradients(model: nn.Module, first: Tensor, second: Tensor) -> None:
    trainable = [each for each in model.parameters() if each.requires_grad]
    flat = [
        torch.cat([each.flatten() for each in torch.autograd.grad(loss, trainable)])
        for loss in (first, second)
    ]
    assert (flat[0] - flat[1]).norm() < 1e-5 * flat[1].norm()


@pytest.mark.parametrize("share", [False, True], ids=["whole rows", "shared prefix"])
def test_completion_log_probs_and_gradients_equal_the_naive_loop(peft_model, batch, share):
    prefix_length = shared_prefix_length(batch) if share else 0
    log_probs = completion_log_probs(
        peft_model, peft_model.get_output_embeddings(), batch, prefix_length=prefix_length
    )
    naive = _naive_log_probs(peft_model)
    torch.testing.assert_close(log_probs, naive)
    _assert_same_gradients(peft_model, log_probs.sum(), naive.sum())


def test_head_sees_predicting_positions_only_and_is_left_without_hooks(peft_model, batch):
    head = peft_model.get_output_embeddings()
    seen = []
    handle = head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    completion_log_probs(peft_model, head, batch)
    handle.remove()
    assert seen == [(sum(len(completion) for _, completion in ROWS), 32)]
    assert not head._forward_pre_hooks


def test_shared_prefix_ends_before_the_first_difference_and_before_any_completion(batch):
    assert shared_prefix_length(batch) == len(SHARED) - 1
    alone = {name: each[:1] for name, each in batch.items()}
    assert shared_prefix_length(alone) == len(SHARED) + len(ROWS[0][0]) - 1


def trainer_of(model: nn.Module, tokenizer: Any, batch: dict[str, Tensor], folder: Path, **more):
    rows = {"input_ids": batch["input_ids"].tolist(), "labels": batch["labels"].tolist()}
    return CompletionTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            **more,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("num_items", [None, 24])
def test_loss_and_gradients_equal_those_of_trl(
    peft_model, tokenizer, batch, tmp_path: Path, loss_type, num_items
):
    trainer = trainer_of(peft_model, tokenizer, batch, tmp_path, loss_type=loss_type)
    peft_model.train()
    items = None if num_items is None else torch.tensor(num_items)
    ours = trainer.compute_loss(peft_model, dict(batch), num_items_in_batch=items)
    theirs = SFTTrainer.compute_loss(trainer, peft_model, dict(batch), num_items_in_batch=items)
    torch.testing.assert_close(ours, theirs)
    _assert_same_gradients(peft_model, ours, theirs)


@pytest.mark.parametrize("drawn", [None, "neftune", "lora_dropout", "attention_dropout"])
def test_no_prefix_is_shared_where_something_is_drawn_for_every_row(
    model, tokenizer, batch, tmp_path: Path, drawn
):
    lora = LoRAArguments(lora_r=4, lora_dropout=0.5 if drawn == "lora_dropout" else 0.0)
    worn = attach_lora(ChatModel(model, tokenizer, "tiny"), lora, seed=0)
    if drawn == "attention_dropout":
        for layer in worn.get_base_model().model.layers:
            layer.self_attn.attention_dropout = 0.1
    noise = {"neftune_noise_alpha": 5.0} if drawn == "neftune" else {}
    trainer = trainer_of(worn, tokenizer, batch, tmp_path, **noise)
    assert trainer._shares_prefix() == (drawn is None)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("family", ["OPT", "Bloom"])
def test_dropout_is_seen_however_a_model_holds_it(tokenizer, batch, tmp_path, family, dropout):
    """OPT as numbers of its layers, Bloom as modules."""
    small = {"vocab_size": 259, "hidden_size": 16, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(
        OPTConfig(**small, num_hidden_layers=1, ffn_dim=16, word_embed_proj_dim=16, dropout=dropout)
        if family == "OPT"
        else BloomConfig(**small, n_layer=1, hidden_dropout=dropout)
    )
    trainer = trainer_of(model, tokenizer, batch, tmp_path)
    assert trainer._drops_out == (dropout > 0)


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_stops_the_run(tmp_path: Path, key, value):
    logs = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.5, key: value}
    with pytest.raises(UserError, match=rf"{key} is .* at step 7 with learning rate 0\.5"):
        LossLog(tmp_path).on_log(
            SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
            TrainerState(global_step=7),
            TrainerControl(),
            logs=logs,
        )


def test_loss_log_drops_rows_after_the_checkpoint_and_a_half_line(tmp_path: Path):
    (tmp_path / "loss.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo'
    )
    LossLog(tmp_path).on_train_begin(
        SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True),
        TrainerState(global_step=2),
        TrainerControl(),
    )
    assert [row["step"] for row in Run(tmp_path).read("loss")] == [1, 2]


def test_checkpoint_without_its_mark_is_not_resumed(tmp_path: Path):
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    for step in (2, 10):
        CheckpointMark().on_save(args, TrainerState(global_step=step), TrainerControl())
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
