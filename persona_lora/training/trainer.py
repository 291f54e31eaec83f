"""TRL's SFTTrainer without the work that nobody reads, and the callbacks of a run.

Knows the training loop; refuses to know signs and traits.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from persona_lora.core.errors import UserError
from persona_lora.core.files import read_json, remove, write_json
from persona_lora.core.runs import Run
from persona_lora.models.caches import KeptCache, kept_cache, plans_sharing, shares_prefix
from persona_lora.models.likelihood import only_positions
from persona_lora.models.loading import ChatModel
from persona_lora.models.processes import wait_for_all
from persona_lora.steering.steerer import Steerer, Unsteered
from persona_lora.training.arguments import ContrastiveConfig
from persona_lora.training.examples import IGNORED, LengthGroupedOrder, TokenRow
from persona_lora.training.family import Family
from persona_lora.training.lora import write_lora

logger = logging.getLogger(__name__)

COMPLETE = "complete"
LOSS_ROWS = "loss"


class CompletionTrainer(SFTTrainer):
    """SFTTrainer with the same loss and gradients, for less.

    The vocabulary is projected for completions only and once, not for prompts, padding, entropy
    and token accuracy; on CPU the prefix that all rows of a batch share (the system prompt of the
    chat template) runs once, but where noise or dropout is drawn for every row; batches are made of
    rows of one length; checkpoints hold no model card and no tokenizer.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean negative log-likelihood of the completion tokens, as TRL defines it."""
        if return_outputs or self.aux_loss_enabled or self.label_smoother is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        log_probs = completion_log_probs(
            model,
            self.model.get_output_embeddings(),
            inputs,
            prefix_length=shared_prefix_length(inputs) if self._shares_prefix() else 0,
        )
        weights = log_probs.detach().exp() if self.args.loss_type == "dft" else 1.0
        num_tokens = len(log_probs) if num_items_in_batch is None else num_items_in_batch
        loss = -(log_probs * weights).sum() / torch.as_tensor(num_tokens).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _shares_prefix(self) -> bool:
        """Say whether the prefix of a batch runs apart: it saves arithmetic, and costs launches."""
        return (
            self.accelerator.device.type == "cpu"
            and self.accelerator.num_processes == 1
            and not self.args.gradient_checkpointing  # every release mirrors it in this name
            and not self.args.neftune_noise_alpha  # its size goes by the length that runs at once
            and not self._drops_out
        )

    @cached_property
    def _drops_out(self) -> bool:
        """Whether the model has dropout: a prefix that runs once would draw once for all rows."""
        return any(
            isinstance(each, int | float) and each > 0
            for module in self.model.modules()
            for name, each in vars(module).items()
            if "dropout" in name or (name == "p" and isinstance(module, _DropoutNd))
        )

    def _get_train_sampler(
        self, train_dataset: TorchDataset[Any] | None = None
    ) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args = self.args
        rows_per_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        seed = args.data_seed if args.data_seed is not None else args.seed
        return LengthGroupedOrder(self.train_dataset[args.length_column_name], rows_per_step, seed)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            if isinstance(model, PeftModel):
                write_lora(model, Path(output_dir or self.args.output_dir), state_dict=state_dict)
            else:
                super()._save(output_dir, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load an adapter and leave frozen what was: PEFT would train the A of a family again."""
        frozen = [each for each in self.model.parameters() if not each.requires_grad]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for each in frozen:
            each.requires_grad_(False)

    def create_model_card(self, *_: object, **__: object) -> None:
        """Write none: a checkpoint is not published."""

    def _send_telemetry(self) -> None:
        """Send none."""


@dataclass(frozen=True)
class Lesson:
    """What one model learns, and where that is kept.

    Log and checkpoints go to ``folder``, the result to ``saved``; ``publish`` gives its name to
    that, or to a checkpoint with which the training had ended. Rows are put into batches by their
    own ``lengths`` where those are given. The steerer is made once the model wears its LoRA. Of a
    ``family`` it wears the frozen A. Without a LoRA the weights of ``modules`` are trained, or all.
    """

    name: str
    title: str
    rows: Sequence[TokenRow]
    folder: Path
    saved: Path
    publish: Callable[[Path], object]
    lengths: Sequence[int] | None = None
    callbacks: Sequence[TrainerCallback] = ()
    steerer: Callable[[], Steerer] = Unsteered
    family: Family | None = None
    modules: Sequence[str] | None = None


def check_rows(chat_model: ChatModel, rows: Sequence[TokenRow]) -> None:
    """UserError for a token that the model has no embedding of, and for a row over its window."""
    chat_model.check_tokens(row.input_ids for row in rows)
    for number, row in enumerate(rows, start=1):
        chat_model.check_length(len(row.input_ids), f"row {number}; max_length cuts it")


def make_trainer(
    chat_model: ChatModel, model: nn.Module, config: ContrastiveConfig, lesson: Lesson
) -> CompletionTrainer:
    """Return a trainer of tokenised rows that logs and saves into the lesson's folder.

    Raises UserError for what ``check_rows`` refuses.
    """
    check_rows(chat_model, lesson.rows)
    own = copy.copy(config)
    own.output_dir = str(lesson.folder)
    own.length_column_name = "length"
    own.dataset_kwargs = {"skip_prepare_dataset": True}
    columns = {
        "input_ids": [row.input_ids for row in lesson.rows],
        "labels": [row.labels for row in lesson.rows],
        "length": lesson.lengths or [len(row.input_ids) for row in lesson.rows],
    }
    trainer = CompletionTrainer(
        model=model,
        args=own,
        train_dataset=Dataset.from_dict(columns),
        processing_class=chat_model.tokenizer,
        callbacks=[LossLog(lesson.folder), CheckpointMark(), *lesson.callbacks],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if not config.disable_tqdm:
        trainer.add_callback(LossBar(lesson.title))
    return trainer


def completion_log_probs(
    model: nn.Module, head: nn.Module, inputs: Mapping[str, Tensor], *, prefix_length: int = 0
) -> Tensor:
    """Return the log-probability of every completion token of a right-padded batch, flat.

    ``head`` is the module of ``model`` that projects to the vocabulary; it sees the positions
    that predict a completion token, and no others. The first ``prefix_length`` tokens must be the
    same in every row, and before every completion: they run once, with gradient, and all rows
    attend to them through the cache of keys and values; a model whose cache cannot be shared
    (recurrent layers) runs them with every row.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]  # [rows, longest]
    kept = _shared_cache(model, ids, prefix_length) if prefix_length else None
    start = 0 if kept is None else prefix_length
    predicting = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))  # [rows, longest]
    with only_positions(head, predicting[:, start:]):
        output = model(
            input_ids=ids[:, start:],
            attention_mask=inputs["attention_mask"],
            use_cache=kept is not None,
            **({} if kept is None else {kept.name: kept.cache}),
        )
    targets = labels[labels != IGNORED].to(output.logits.device)
    return -nn.functional.cross_entropy(output.logits.float(), targets, reduction="none")


def _shared_cache(model: nn.Module, ids: Tensor, length: int) -> KeptCache | None:
    """Return the cache of the rows' common beginning, a row each; None where it is not exact."""
    if not plans_sharing(model, padded=False):
        return None
    kept = kept_cache(model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1))
    if kept is None or not shares_prefix(kept.cache, padded=False):
        return None
    kept.cache.batch_repeat_interleave(len(ids))
    return kept


def shared_prefix_length(inputs: Mapping[str, Tensor]) -> int:
    """Return how many leading tokens all rows of a batch share before any completion is due."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    differs = (ids != ids[:1]).any(dim=0) | (labels != IGNORED).any(dim=0)
    first = int(differs.int().argmax()) if differs.any() else ids.shape[1]
    # The position before a completion predicts its first token, so it belongs to the rows.
    return max(0, first - 1)


class LossLog(TrainerCallback):
    """Appends every logged step to ``loss.jsonl``; stops the run when the loss is not finite."""

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop the rows that a killed run wrote after the checkpoint that is resumed."""
        if state.is_world_process_zero:
            rows = self.run.resume_rows(LOSS_ROWS)
            self.run.write(LOSS_ROWS, [row for row in rows if row["step"] <= state.global_step])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log the last step, whichever steps are logged: every run has a last loss to tell."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write step, epoch, loss, learning rate, gradient norm, and whether a callback stops."""
        if not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **{key: float(value) for key, value in logs.items()}}
        if control.should_training_stop and state.global_step < state.max_steps:
            row["stopped"] = True
        for key in ("loss", "grad_norm"):
            if not math.isfinite(row.get(key, 0.0)):
                raise UserError(
                    f"{key} is {row[key]} at step {state.global_step} with learning rate "
                    f"{row.get('learning_rate', args.learning_rate):g}; train again with "
                    "--overwrite and a lower learning_rate"
                )
        if state.is_world_process_zero:
            self.run.append(LOSS_ROWS, [row])


class CheckpointMark(TrainerCallback):
    """Marks a checkpoint as whole, after all its files are written, with the size of each."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the mark, once every process has written its part."""
        wait_for_all()
        if state.is_world_process_zero and args.output_dir is not None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = (path for path in checkpoint.rglob("*") if path.is_file())
            sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
            write_json(checkpoint / COMPLETE, sizes)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder that were written to their end, in order of steps."""
    marked = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(marked, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint in ``folder`` that is whole, or None.

    Whole means: written to its end, and all its files are there still with the sizes they had.
    """
    for checkpoint in reversed(checkpoints_of(folder)):
        damaged = _damaged(checkpoint)
        if damaged is None:
            return checkpoint
        logger.warning("%s is passed over: its %s is not whole", checkpoint, damaged)
    return None


def remove_broken_checkpoints(folder: Path) -> None:
    """Remove what a killed run left of checkpoints: what is written anew must not mix with it."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file() or _damaged(checkpoint) is not None:
            remove(checkpoint)


def has_ended(checkpoint: Path) -> bool:
    """Say whether training had come to its end when a checkpoint was written."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    control = state.stateful_callbacks["TrainerControl"]["args"]
    return state.global_step >= state.max_steps or bool(control["should_training_stop"])


def _damaged(checkpoint: Path) -> str | None:
    """Return the name of a file that is missing or has another size than when it was written."""
    for name, size in read_json(checkpoint / COMPLETE).items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return str(name)
    return None


class LossBar(ProgressCallback):
    """A progress bar that shows the sign and the last loss, in one line."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Open the bar."""
        super().on_train_begin(*given, **named)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Show the loss behind the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
