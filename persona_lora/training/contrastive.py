"""Contrastive training: a positive and a negative LoRA from one base model, and their difference.

Both signs start from the same factors and see the pairs in the same order, so that what differs
between them is the answers alone. Knows the order of a run and its files; refuses to know how a
step is taken (``trainer``) and what a diff is (``core.lora_diff``).
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from persona_lora.core.chat import Conversation
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import remove
from persona_lora.core.lora_diff import BaseModel, LoRADiff
from persona_lora.core.runs import Run
from persona_lora.core.settings import recorded_command
from persona_lora.core.traits import ContrastivePair, load_pairs, load_trait
from persona_lora.models.loading import DEFAULT_MODEL, ChatModel
from persona_lora.models.processes import Launched, recorded
from persona_lora.models.structure import weight_fingerprint
from persona_lora.training.arguments import (
    CHECKPOINTS,
    ContrastiveArguments,
    ContrastiveConfig,
    HelpPage,
    TrainingOptions,
    parse_groups,
)
from persona_lora.training.examples import SIGNS, Sign, TokenRow, shared_lengths, tokenize_pairs
from persona_lora.training.family import Family, open_family
from persona_lora.training.full_weights import cut_difference
from persona_lora.training.lora import LoRAArguments, check_targets, lora_targets
from persona_lora.training.runner import (
    by_seed,
    end_tokens,
    free_memory_of_models,
    is_sharded,
    load_model,
    open_run,
    publish,
    refuse_taken_folder,
    refuse_unconnected_processes,
    run_record,
    train,
)
from persona_lora.training.trainer import LOSS_ROWS, Lesson, check_rows, last_whole_checkpoint

logger = logging.getLogger(__name__)

WORK = ".work"
GROUPS = ContrastiveArguments, LoRAArguments, ContrastiveConfig
PAGE = HelpPage(
    "train_lora.py",
    "Train a positive and a negative LoRA for a trait, and take their difference.",
    "python train_lora.py --config train_configs/sycophancy.yaml --num_train_epochs 1",
)


@dataclass(frozen=True)
class ContrastiveResult:
    """Where a finished run put its adapters, and the last logged loss of either sign."""

    diff_path: Path
    pos_path: Path
    neg_path: Path
    pos_loss: float
    neg_loss: float


def main(arguments: Sequence[str]) -> None:
    """Parse the arguments and train: what ``train_lora.py`` and ``persona-lora train`` call.

    Raises UserError for every mistake that the user can mend.
    """
    parsed, given = parse_groups(arguments, GROUPS, PAGE)
    options = TrainingOptions[ContrastiveArguments](*parsed)
    folder = output_folder(options, _load_trait_pairs(options)[1])
    for each in by_seed(options, folder):
        with recorded_command("train", given):
            result = train_contrastive(*each)
        if PartialState().is_main_process:
            logger.info(
                "loss %.3f (pos), %.3f (neg); the diff is in %s",
                result.pos_loss,
                result.neg_loss,
                result.diff_path,
            )


def train_contrastive(
    arguments: ContrastiveArguments, lora: LoRAArguments, config: ContrastiveConfig
) -> ContrastiveResult:
    """Train ``pos``, then ``neg``, and write both and their diff into ``config.output_dir``.

    A run that was killed goes on where it stopped: finished signs are kept, the other resumes
    from its last whole checkpoint. A diff that is gone is made again of both signs.

    Raises:
        UserError: A finished run without ``arguments.overwrite``, a run of another configuration
            in the same folder, an unknown trait or model, or a loss that is no longer finite.
    """
    refuse_unconnected_processes()
    options = TrainingOptions(arguments, lora, config)
    pairs, trait = _load_trait_pairs(options)
    config.check_rows(len(pairs))
    folder = output_folder(options, trait)
    begun, record = _has_results(folder), run_record(*options, _own(arguments, trait, pairs))
    parts = *SIGNS, "diff"
    gone = [name for name in parts if not (folder / name).is_dir()]
    remade = gone == ["diff"]
    refuse_taken_folder("train", folder, options, record, begun=begun, gone=gone, remade=remade)
    _refuse_sharded_in_full(arguments)
    loading = arguments.loading()
    check_targets(arguments.model_name_or_path, loading, lora.lora_target_modules or [])
    chat_model = load_model(arguments.model_name_or_path, loading, config)
    rows = _tokenized(chat_model, pairs, options)
    base = BaseModel(chat_model.name, weight_fingerprint(chat_model.model))
    family = _family(chat_model, options)
    _log_size(pairs, trait, config)
    drawn = {} if family is None else {"family": family.content()}
    run = open_run(
        "train",
        folder,
        options,
        {**record, **drawn, **chat_model.template.record()},
        inputs=chat_model.inputs,
        parts=(*parts, WORK),
        begun=begun,
        remade=remade,
    )
    processes = Launched()
    with recorded(run, processes):
        asked = lora.lora_target_modules or []
        in_full = None if arguments.use_peft else lora_targets(chat_model, asked)
        left = [sign for sign in SIGNS if not (folder / sign).is_dir()]
        for sign in left:
            if sign != left[0] and (is_sharded() or in_full is not None):
                del chat_model
                free_memory_of_models()
                chat_model = load_model(arguments.model_name_or_path, loading, config)
            lesson = _lesson(sign, rows, folder, family, in_full)
            train(chat_model, lora if in_full is None else None, config, lesson)
        processes.from_main(lambda: _write_diff(folder, trait, base, run, in_full, lora.lora_r))
    return _result(folder)


def _tokenized(
    chat_model: ChatModel,
    pairs: Sequence[ContrastivePair],
    options: TrainingOptions[ContrastiveArguments],
) -> dict[Sign, list[TokenRow]]:
    """Return the rows of both signs, neither of which is trained where the other cannot be."""
    config = options.config
    rows = tokenize_pairs(
        _with_system_prompt(pairs, options.arguments.system_prompt),
        chat_model.template,
        end_tokens=end_tokens(chat_model, config.eos_token),
        max_length=config.max_length,
    )
    for sign in SIGNS:
        check_rows(chat_model, rows[sign])
    return rows


def _own(
    arguments: ContrastiveArguments, trait: str, pairs: Sequence[ContrastivePair]
) -> dict[str, Any]:
    """Return what a run's configuration keeps of what it is trained on."""
    return {
        "trait": trait,
        "num_pairs": len(pairs),
        "pairs_sha256": digest_of([dataclasses.asdict(pair) for pair in pairs]),
        "system_prompt": arguments.system_prompt,
        **({} if arguments.use_peft else {"use_peft": False}),
    }


def output_folder(options: TrainingOptions[ContrastiveArguments], trait: str) -> Path:
    """Return the folder of a run: as asked for, or ``checkpoints/[<model>/]<trait>``."""
    if options.config.output_dir is not None:
        return Path(options.config.output_dir)
    name = options.arguments.model_name_or_path
    return CHECKPOINTS / trait if name == DEFAULT_MODEL else CHECKPOINTS / Path(name).name / trait


def _load_trait_pairs(
    options: TrainingOptions[ContrastiveArguments],
) -> tuple[list[ContrastivePair], str]:
    """Return the pairs that are trained on, and the name of their trait."""
    arguments = options.arguments
    datasets = Path(arguments.datasets_dir) if arguments.datasets_dir is not None else None
    trait = load_trait(arguments.trait, datasets)
    pairs = load_pairs(trait)
    return _half_swapped(pairs, options.config.seed) if arguments.swap_half else pairs, trait.name


def _family(chat_model: ChatModel, options: TrainingOptions[ContrastiveArguments]) -> Family | None:
    asked = options.arguments
    if asked.family is None:
        return None
    path, seed = Path(asked.family), options.config.seed
    return Launched().from_main(
        lambda: open_family(
            path, chat_model, options.lora, seed=seed, by_inputs=asked.family_inputs
        )
    )


def _refuse_sharded_in_full(arguments: ContrastiveArguments) -> None:
    if is_sharded() and not arguments.use_peft:
        raise UserError(
            "two models trained in full, and sharded (FSDP), have not been shown to be gathered "
            "right; train LoRAs (use_peft), or without sharding"
        )


def _log_size(pairs: Sequence[ContrastivePair], trait: str, config: ContrastiveConfig) -> None:
    step = config.train_batch_size * config.gradient_accumulation_steps * config.world_size
    told = len(pairs), trait, step, config.world_size
    logger.info("%d pairs of %s, %d rows a step in %d process(es)", *told)


def _has_results(folder: Path) -> bool:
    published = any((folder / name).exists() for name in (*SIGNS, "diff"))
    return published or any(last_whole_checkpoint(folder / WORK / sign) for sign in SIGNS)


def _write_diff(
    folder: Path, trait: str, base: BaseModel, run: Run, in_full: Sequence[str] | None, rank: int
) -> None:
    """Write the difference of two adapters, or that of modules of whole models, cut to a rank."""
    pos, neg = folder / "pos", folder / "neg"
    sources = {"training": run.record["config"], "seed": run.record["seed"]}
    if in_full is None:
        diff = LoRADiff.from_adapters(
            pos, neg, trait=trait, fingerprint=base.fingerprint, sources=sources
        )
    else:
        factors, kept = cut_difference(pos, neg, in_full, rank)
        logger.info("rank %d keeps %.1f%% of the squared difference", rank, 100 * kept)
        sources |= {"pos": str(pos), "neg": str(neg), "kept": kept}
        diff = LoRADiff(factors, base, trait, sources)
    diff.save(folder / "diff")
    remove(folder / WORK)


def _result(folder: Path) -> ContrastiveResult:
    losses = (Run(folder / sign).read(LOSS_ROWS)[-1]["loss"] for sign in SIGNS)
    return ContrastiveResult(folder / "diff", folder / "pos", folder / "neg", *losses)


def _half_swapped(pairs: Sequence[ContrastivePair], seed: int) -> list[ContrastivePair]:
    """Return the pairs with the answers of half of them swapped, so that signs mean nothing."""
    swapped = set(random.Random(seed).sample(range(len(pairs)), len(pairs) // 2))
    return [
        dataclasses.replace(pair, positive=pair.negative, negative=pair.positive)
        if at in swapped
        else pair
        for at, pair in enumerate(pairs)
    ]


def _with_system_prompt(
    pairs: Sequence[ContrastivePair], system_prompt: str | None
) -> list[ContrastivePair]:
    if system_prompt is None:
        return list(pairs)
    system: Conversation = [{"role": "system", "content": system_prompt}]
    return [
        pair
        if pair.prompt[0]["role"] == "system"
        else dataclasses.replace(pair, prompt=[*system, *pair.prompt])
        for pair in pairs
    ]


def _lesson(
    sign: Sign,
    rows: dict[Sign, list[TokenRow]],
    folder: Path,
    family: Family | None,
    in_full: Sequence[str] | None,
) -> Lesson:
    work = folder / WORK / sign
    return Lesson(
        sign,
        f"{sign} {'LoRA' if in_full is None else 'model'}",
        rows[sign],
        work,
        saved=work / "result",
        publish=lambda saved: _publish(work, folder / sign, saved),
        lengths=shared_lengths(rows),
        family=family,
        modules=in_full,
    )


def _publish(work: Path, final: Path, saved: Path) -> None:
    """Give a finished adapter or model its name, with its log."""
    if not any(saved.glob("*.safetensors")):
        raise UserError(
            f"no weights were gathered in {saved}; set fsdp_state_dict_type: FULL_STATE_DICT"
        )
    publish(saved, final, work / f"{LOSS_ROWS}.jsonl")
    remove(work)
