"""What did this adapter do? Its traits, where it sits, and the words it promotes, as one run.

A finetune that is there already, ours or not, an adapter or a whole model, is projected on trait
directions (``projections``), beside other finetunes that are unrelated to the traits: their mean
change, which all finetunes share, is taken off, and how far they lie apart says what is usual. What
it does to words is read from the model with and without it, over prompts that are there: forward
passes, no answer is generated. Measures and keeps rows; ``read_diagnosis`` says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from persona_lora.core import progress
from persona_lora.core.content import path_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import write_csv, write_json
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import Output, Run
from persona_lora.models.likelihood import NextTokens, next_tokens
from persona_lora.models.loading import ChatModel
from persona_lora.models.weight_files import weights_of
from persona_lora.projections.inputs import (
    WEIGHTED,
    kept_inputs,
    shared_beginning,
    tokenized_prompts,
)
from persona_lora.steering.bank import steer_live
from persona_lora.studies.asking.run import contents_of, open_run
from persona_lora.studies.drift.figure import render_diagnosis
from persona_lora.studies.drift.read_diagnosis import (
    APART,
    CONTROL,
    CONTROL_APART,
    WHOLE,
    diagnosis_record,
)
from persona_lora.studies.drift.run import (
    Checkpoint,
    Projected,
    check_finetunes,
    is_adapter,
    loaded_checkpoint,
    project_finetune,
    projection_rows,
    summaries,
    taken_off,
)
from persona_lora.studies.promoted_words import changed_words
from persona_lora.studies.report_page import write_report


@dataclass(frozen=True)
class Subject:
    """The finetune that is asked about (an adapter or a full model), and what it stands beside.

    ``controls`` are finetunes that are unrelated to the traits of ``diffs``.
    """

    name: str
    diffs: Mapping[str, LoRADiff]
    controls: tuple[str, ...] = ()

    @classmethod
    def load(cls, name: str, diffs: Mapping[str, LoRADiff], controls: Sequence[str] = ()) -> Self:
        """Return it once all could be read (``check_finetunes``).

        UserError for one given twice, and for controls of another kind than the finetune.
        """
        check_finetunes([name], controls, "")
        adapter = next(filter(is_adapter, controls), None)
        if adapter is not None and not is_adapter(name):
            raise UserError(
                f"{name} is no adapter, and {adapter} is one; a full model takes one full model as "
                "--controls, and no adapters"
            )
        known: dict[str, str] = {}
        for each in (name, *controls):
            content = LoRADiff.load(each).content() if is_adapter(each) else each
            if content in known:
                raise UserError(
                    f"{each} is the same as {known[content]}; --controls must be other finetunes, "
                    "each once"
                )
            known[content] = each
        return cls(name, diffs, tuple(controls))

    def inputs(self) -> dict[str, str]:
        """Return digests of all that is read."""
        paths = [Path(each) for each in (self.name, *self.controls)]
        found = {f"the finetune {each}": path_digest(each) for each in paths if each.exists()}
        return {**found, **contents_of("diff", self.diffs)}


def diagnose(
    base: ChatModel, subject: Subject, output: Output | Path, *, prompts: Sequence[str]
) -> Run:
    """Write rows, ``diagnosis.json`` and ``.png``, and ``report.html`` into ``output``.

    ``base`` is the model before finetuning. Directions are weighted by its inputs on ``prompts``,
    which are also what words are read on.
    """
    inputs = kept_inputs(base, prompts)
    control, before = taken_off(subject.controls, base.name, [subject.name])
    config = {
        "finetune": subject.name,
        "diffs": list(subject.diffs),
        "controls": list(subject.controls),
        "prompts": {"digest": inputs.prompts, "number": len(prompts), "tokens": inputs.tokens},
    }
    parts = ("diagnosis.*", "*.csv", "report.html")
    run = open_run(output, "diagnose", base, config, subject.inputs(), parts=parts)

    def projected(name: str, reference: str = base.name, less: LoRADiff | None = None) -> Projected:
        revision = base.options.revision if reference == base.name else None
        source = partial(weights_of, reference, revision)
        return project_finetune(name, source, subject.diffs, inputs=inputs, control=less)

    with run:
        found = [(WHOLE, projected(subject.name))]
        if subject.controls:
            found.append((APART, projected(subject.name, before, control)))
        adapters = [each for each in subject.controls if is_adapter(each)]
        found += [(CONTROL, projected(each)) for each in adapters]
        found += [(CONTROL_APART, projected(each, before, control)) for each in adapters]
        shares = found[0][1].by_geometry[WEIGHTED].shares()
        for name, rows in {
            "projections": [
                {"what": w, **row} for w, each in found for row in projection_rows([each])
            ],
            "finetunes": [{"what": w, **row} for w, each in found for row in summaries(each)],
            "shares": [dict(zip(("part", "of", "share"), each, strict=True)) for each in shares],
            "words": list(_words(base, subject, prompts)),
        }.items():
            run.write(name, rows)
            write_csv(run.folder / f"{name}.csv", list(rows[0]) if rows else [], rows)
        write_json(run.folder / "diagnosis.json", diagnosis_record(run))
        render_diagnosis(run).save(run.folder / "diagnosis.png")
    write_report([run.folder], run.folder / "report.html")
    return run


def _words(base: ChatModel, subject: Subject, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    ids = tokenized_prompts(base, prompts)
    begins = shared_beginning(ids)
    with progress.stage("words, without"):
        without = next_tokens(base, ids, begins)
    with progress.stage("words, with"):
        after = _reading(base, subject, ids, begins)
    return changed_words(base, without, after)


def _reading(
    base: ChatModel, subject: Subject, ids: list[list[int]], begins: int
) -> tuple[NextTokens, NextTokens]:
    if is_adapter(subject.name):
        with steer_live(base, {LoRADiff.load(subject.name): 1.0}):
            return next_tokens(base, ids, begins)
    with loaded_checkpoint(base, Checkpoint(subject.name, 0, Path(subject.name))) as model:
        return next_tokens(model, ids, begins)
