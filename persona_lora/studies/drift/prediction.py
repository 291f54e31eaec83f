"""Do projections predict what finetuning does to character? Many finetunes, each judged on traits.

Every finetune (a LoRA on the same base) is asked the held-out questions of every trait and judged;
its weight change is projected on every diff, weighted by the base model's inputs, and the shift of
the base model's own answers on every steering vector. All pairs of judged trait and direction are
kept, not only those of equal name: a direction that predicts another trait as well as its own says
little about either.

Beside them stand what needs no projection: the judge's mean score of the answers that a finetune
was trained on (text), the number of answers it saw (dose), and how far its weights moved at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.chat import Exchange, Message, read_messages, user_question
from persona_lora.core.content import digest_of, model_folder_digest
from persona_lora.core.errors import UserError
from persona_lora.core.files import numbered_jsonl, read_jsonl, write_csv
from persona_lora.core.lora_diff import LoRADiff, turned_diff
from persona_lora.core.options import GenerationOptions
from persona_lora.core.protocol import Design
from persona_lora.core.runs import RECORD, Output, Planned, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import Split, Trait, check_names
from persona_lora.judges.judging import Judge
from persona_lora.judges.verdicts import lazily
from persona_lora.models.generation import generate_answers
from persona_lora.models.likelihood import TokenizedExchange, tokenize_rendered
from persona_lora.models.loading import ChatModel
from persona_lora.projections.activation_space import project_hidden_states
from persona_lora.projections.inputs import ModuleInputs, kept_inputs, load_ordinary_prompts
from persona_lora.projections.weight_space import project_adapter
from persona_lora.report.scores import JUDGE, marked
from persona_lora.studies.asking.run import contents_of, evaluate, open_planned
from persona_lora.studies.drift.figure import render_prediction
from persona_lora.studies.drift.read_prediction import (
    BASE,
    DISTANCE,
    DOSE,
    FEWEST,
    FROM_CONTROL,
    NULL,
    SHARED,
    TEXT,
    WEIGHTS,
    answers_place,
    predict,
    rows_of,
)

JUDGED, PREDICTORS = "judged", "predictors"
RANDOM_DIRECTIONS = 40  # of each diff, its outputs turned
LOSS = "loss.jsonl"
JudgeOf = Callable[[Trait], Callable[[], Judge]]


@dataclass(frozen=True, eq=False)
class DriftStudy:
    """What is finetuned (adapters by name), judged (traits) and projected on (by direction)."""

    finetunes: Mapping[str, Path]
    traits: Sequence[Trait]
    diffs: Mapping[str, LoRADiff]
    vectors: Mapping[str, SteeringVector]
    layer: int
    split: Split = "eval"
    control_rows: str | None = None  # the data file, beside each finetune's own, of its control
    prompts: Sequence[str] | None = None  # to take inputs on; None: the ordinary ones

    def __post_init__(self) -> None:
        for name, path in self.finetunes.items():
            if not (path / "adapter_config.json").is_file():
                raise UserError(f"the finetune {name} is no adapter: {path} has no adapter_config")
        if not self.finetunes or not self.traits or not (self.diffs or self.vectors):
            raise UserError("a study needs finetunes, traits to judge, and directions")
        check_names(self.traits)
        if len(self.finetunes) < FEWEST:
            raise UserError(
                f"{len(self.finetunes)} finetunes are too few to correlate; give at least {FEWEST}"
            )
        judged = [trait.name for trait in self.traits]
        for directions in (self.diffs, self.vectors):
            if directions and not directions.keys() & set(judged):
                raise UserError(
                    f"none of {', '.join(directions)} is a direction of {', '.join(judged)}, and a "
                    "trait is predicted by its own; judge it, or give its direction"
                )
        self.controls()

    def asked(self) -> Sequence[str]:
        """Return the prompts that the inputs of the base model are taken on."""
        return load_ordinary_prompts() if self.prompts is None else self.prompts

    def controls(self) -> dict[str, str]:
        """Return for every finetune the one of its settings on ``control_rows``, its control.

        Those on ``control_rows`` have none. UserError for a finetune without a control.
        """
        if self.control_rows is None:
            return {}
        trained = {name: _trained(name, folder) for name, folder in self.finetunes.items()}
        by_training = {each: name for name, each in trained.items()}
        found = {}
        for name, (path, settings, checkpoint) in trained.items():
            plain = path.with_stem(Path(self.control_rows).stem)
            if path == plain:
                continue
            control = by_training.get((plain, settings, checkpoint))
            if control is None:
                raise UserError(
                    f"{name} has no control: none of the finetunes was trained on {plain} with its "
                    "seed and settings; finetune one, or leave control_rows out"
                )
            found[name] = control
        if len(found) < FEWEST:
            raise UserError(
                f"{len(found)} finetunes with a control are too few to correlate; give at least "
                f"{FEWEST}"
            )
        return found


def predict_finetuning(
    base: ChatModel,
    study: DriftStudy,
    judge_of: JudgeOf,
    output: Output | Path,
    *,
    options: GenerationOptions = GenerationOptions(max_new_tokens=60),
) -> Run:
    """Judge and project every finetune into the run ``output``; what is there is kept.

    Writes ``judged.jsonl`` (finetune, trait, score …), ``predictors.jsonl`` (finetune, direction,
    kind, value), ``prediction.csv`` (every correlation) and ``prediction.png``.
    """
    output = Output.of(output)
    with open_planned(output, planned_prediction(study, options), base, parts=("answers",)) as run:
        texts = _base_texts(base, study, options) if study.vectors else []
        states = _states(base, study, texts)
        inputs = kept_inputs(base, study.asked()) if study.diffs else None
        judges = {trait.name: lazily(judge_of(trait)) for trait in study.traits}
        of_text: dict[str, dict[str, float]] = {}
        _judge(output, study, BASE, base, judges, options)
        controls = study.controls()
        for name, folder in progress.over("finetunes", list(study.finetunes.items())):
            known = {row["finetune"] for row in run.resume_rows(PREDICTORS)}
            if name in known and not _missing(run, study, name):
                continue
            tuned = base.reload(adapter=folder)
            _judge(output, study, name, tuned, judges, options)
            if name not in known:
                shift = _states(tuned, study, texts) - states if study.vectors else None
                found = _predictors(study, name, inputs, shift, controls.get(name))
                run.extend(PREDICTORS, found + _told_by_data(study, name, folder, judges, of_text))
        _project_on_random(run, study, inputs)
        _keep_those_of(study, run)
        rows = rows_of(run)
        by = {row["trait"]: row[JUDGE] for row in rows[0]}
        table = [
            {**asdict(each), JUDGE: by.get(each.judged, marked(*by.values()))}
            for each in predict(*rows)
        ]
        write_csv(run.folder / "prediction.csv", list(table[0]), table)
        render_prediction(*rows).save(run.folder / "prediction.png")
    return run


def planned_prediction(study: DriftStudy, options: GenerationOptions) -> Planned:
    """Return what is known of a study before its model is loaded.

    UserError for a finetune that is given twice under two names.
    """
    directions = sorted({*study.diffs, *study.vectors})
    config = {
        "traits": [trait.name for trait in study.traits],
        "directions": directions,
        "layer": study.layer,
        "split": study.split,
        **vars(options),
        **({} if study.control_rows is None else {"control_rows": study.control_rows}),
    }
    inputs = {name: each for trait in study.traits for name, each in trait.inputs().items()}
    inputs |= contents_of("diff", study.diffs) | contents_of("vector", study.vectors)
    inputs |= _finetune_contents(study)
    if study.diffs:
        inputs["the ordinary prompts"] = digest_of(list(study.asked()))
    design = Design.of(
        "predict-finetuning",
        {trait.name: len(trait.questions[study.split]) for trait in study.traits},
        tuple(f"{trait.name} by {name}" for trait in study.traits for name in directions),
    )
    return Planned("predict-finetuning", config, options.seed, inputs, design)


def _finetune_contents(study: DriftStudy) -> dict[str, str]:
    """Return digests of the finetunes; UserError for one that is given twice under two names."""
    contents = {name: model_folder_digest(at) for name, at in study.finetunes.items()}
    first = {content: name for name, content in reversed(contents.items())}
    for name, content in contents.items():
        if first[content] != name:
            raise UserError(f"{name} is the finetune {first[content]} once more; leave one out")
    return {f"the finetune {name}": content for name, content in contents.items()}


def _keep_those_of(study: DriftStudy, run: Run) -> None:
    """Keep the rows of the study's finetunes, and say of each from which data and seed it is."""
    told: dict[str, dict[str, Any]] = {BASE: {}}
    told |= {name: _origin(folder) for name, folder in study.finetunes.items()}
    for name, control in study.controls().items():
        told[name]["control"] = control
    for name in (JUDGED, PREDICTORS):
        kept = [row for row in run.read(name) if row["finetune"] in told]
        run.write(name, [{**row, **told[row["finetune"]]} for row in kept])


def _missing(run: Run, study: DriftStudy, name: str) -> list[Trait]:
    judged = {(row["finetune"], row["trait"]) for row in run.resume_rows(JUDGED)}
    return [trait for trait in study.traits if (name, trait.name) not in judged]


def _judge(
    output: Output,
    study: DriftStudy,
    name: str,
    chat_model: ChatModel,
    judges: Mapping[str, Callable[[], Judge]],
    options: GenerationOptions,
) -> None:
    """Ask and judge what is missing of one finetune, in runs of their own below the study's."""
    run, below = Run(output.path), output.path / answers_place(name)
    for trait in _missing(run, study, name):
        place = Output(below / f"{trait.name}.csv", config={"finetune": name}, inputs=output.inputs)
        judge, split = judges[trait.name], study.split
        result = evaluate(chat_model, trait, judge, place, split=split, options=options)
        told = {each: getattr(result.trait, each) for each in ("low", "high", "n", "coverage")}
        row = {"finetune": name, "trait": trait.name, "score": result.trait.mean, **told}
        run.append(JUDGED, [{**row, "coherence": result.coherence.mean}])


def _base_texts(
    base: ChatModel, study: DriftStudy, options: GenerationOptions
) -> list[TokenizedExchange]:
    """Return the base model's own answers to all questions: the text that shifts are taken on."""
    questions = [user_question(q) for trait in study.traits for q in trait.questions[study.split]]
    answers = generate_answers(base, questions, max_new_tokens=options.max_new_tokens)
    return [
        tokenize_rendered(base, answer.prompt, answer.text) for answer in answers if answer.text
    ]


def _states(chat_model: ChatModel, study: DriftStudy, texts: list[TokenizedExchange]) -> Tensor:
    """Return the mean projection over the texts on every vector, ``[vectors]``."""
    if not study.vectors:
        return Tensor()
    found = project_hidden_states(chat_model, texts, study.vectors, [study.layer])
    return found[:, :, 0, 0].double().mean(dim=0)


def _predictors(
    study: DriftStudy,
    name: str,
    inputs: ModuleInputs | None,
    shift: Tensor | None,
    control: str | None,
) -> list[dict[str, Any]]:
    rows = []
    if inputs is not None:
        adapter = LoRADiff.load(study.finetunes[name])
        weighted = project_adapter(adapter, study.diffs, inputs=inputs)
        plain = project_adapter(adapter, study.diffs)
        apart = None
        if control is not None:
            other = LoRADiff.load(study.finetunes[control])
            apart = project_adapter(adapter, study.diffs, inputs=inputs, control=other).delta_norm
        shared = fmean(value.coordinate for value in weighted.total.values())
        for direction, value in weighted.total.items():
            kinds = {
                WEIGHTS: value.coordinate,
                "weights, corrected": weighted.corrected[direction],
                "weights, plain": plain.total[direction].coordinate,
                DISTANCE: weighted.delta_norm,
            }
            if len(study.diffs) > 1:
                kinds[SHARED] = shared
            if apart is not None:
                kinds[FROM_CONTROL] = apart
            rows += [_row(name, direction, kind, each) for kind, each in kinds.items()]
    if shift is not None:
        pairs = zip(study.vectors, shift.tolist(), strict=True)
        rows += [_row(name, direction, "activations", value) for direction, value in pairs]
    return rows


def _made_in(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the run that made a finetune, and its record: empty where none is."""
    home = next((at for at in (folder, folder.parent) if (at / RECORD).is_file()), None)
    return (folder, {"config": {}, "seed": None}) if home is None else (home, Run(home).record)


def _origin(folder: Path) -> dict[str, Any]:
    """Return the data set and the seed of a finetune; None where no record tells."""
    _, record = _made_in(folder)
    return {"data": _data_of(record["config"]), "seed": record["seed"]}


def _data_of(config: Mapping[str, Any]) -> str | None:
    """Return the digest of the rows of a training, before a prompt was put before them."""
    return config.get("data_sha256", config.get("rows_sha256"))


def _trained(name: str, folder: Path) -> tuple[Path, str, str]:
    """Return the file that a finetune was trained on, its settings, and the checkpoint."""
    config = _made_in(folder)[1]["config"]
    if "train_file" not in config:
        raise UserError(
            f"{name} has no record of what it was trained on, so that its control cannot be told; "
            "leave it or control_rows out"
        )
    other = ("train_file", "num_rows", "rows_sha256", "data_sha256")
    settings = {key: value for key, value in config.items() if key not in other}
    checkpoint = folder.name if folder.name.startswith("checkpoint-") else ""
    return Path(config["train_file"]), digest_of(settings), checkpoint


def _told_by_data(
    study: DriftStudy,
    name: str,
    folder: Path,
    judges: Mapping[str, Callable[[], Judge]],
    of_text: dict[str, dict[str, float]],
) -> list[dict[str, Any]]:
    """Return what the training data alone say: their mean score on every trait, and the dose.

    Nothing where the finetune's record does not name rows that are still there as they were; a
    predictor that not all finetunes have is left out of the predictions. ``of_text`` keeps the
    scores by the digest of the rows: many finetunes are of the same.
    """
    home, record = _made_in(folder)
    config = record["config"]
    path = Path(config.get("train_file", ""))
    if not path.is_file():
        return []
    rows = numbered_jsonl(path)
    conversations = [read_messages(row.get("messages"), where) for where, row in rows]
    digest = digest_of(conversations)
    if digest != _data_of(config):
        return []
    if digest not in of_text:
        of_text[digest] = _text_scores(study.traits, judges, conversations)
    found = [_row(name, trait, TEXT, score) for trait, score in of_text[digest].items()]
    step = int(folder.name.partition("-")[2]) if folder.name.startswith("checkpoint-") else None
    for last in read_jsonl(home / LOSS)[-1:]:  # a checkpoint's own step may not be logged
        seen = config["num_rows"] * last["epoch"] * (step or last["step"]) / last["step"]
        found += [_row(name, trait.name, DOSE, seen) for trait in study.traits]
    return found


def _text_scores(
    traits: Sequence[Trait],
    judges: Mapping[str, Callable[[], Judge]],
    conversations: Sequence[Sequence[Message]],
) -> dict[str, float]:
    """Return the mean score of the answers that were trained on, of every trait that has one."""
    exchanges = [Exchange(turns[-2]["content"], turns[-1]["content"]) for turns in conversations]
    found = {}
    for trait in traits:
        verdicts = judges[trait.name]().judge(exchanges, trait.name)
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if scores:
            found[trait.name] = fmean(scores)
    return found


def _project_on_random(run: Run, study: DriftStudy, inputs: ModuleInputs | None) -> None:
    """Project what lacks it on each diff with its outputs turned at random, one at a time."""
    known = {row["finetune"] for row in run.read(PREDICTORS) if row["kind"] == NULL}
    if inputs is None:
        return
    adapters = {
        name: inputs.weigh(LoRADiff.load(folder))
        for name, folder in study.finetunes.items()
        if name not in known
    }
    planned = [(name, seed) for name in study.diffs for seed in range(RANDOM_DIRECTIONS)]
    rows = []
    for name, seed in progress.over("random directions", planned) if adapters else ():
        control = inputs.weigh(turned_diff(study.diffs[name], seed))
        norm = control.norm()
        rows += [
            _row(finetune, f"{name}#{seed}", NULL, adapter.inner(control) / norm)
            for finetune, adapter in adapters.items()
        ]
    run.extend(PREDICTORS, rows)


def _row(name: str, direction: str, kind: str, value: float) -> dict[str, Any]:
    return {"finetune": name, "direction": direction, "kind": kind, "value": float(value)}
