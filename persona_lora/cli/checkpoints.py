"""Commands about finetunes: every checkpoint of one, and what predicts the drift of many."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from persona_lora.cli.console import console, progress_bars
from persona_lora.cli.option_groups import with_groups
from persona_lora.cli.parsing import (
    generation_options,
    judge_factory,
    judge_inputs,
    judge_options,
    judged_output,
    layer_numbers,
    listed,
    load_model,
    question_split,
)
from persona_lora.cli.program import app
from persona_lora.cli.projecting import TYPES, load_vectors
from persona_lora.cli.refusals import refuse_useless
from persona_lora.cli.shared_options import (
    BatchOption,
    DatasetsOption,
    JudgeCostOption,
    JudgeModelOption,
    JudgeModeOption,
    JudgeOption,
    JudgeUrlOption,
    ModelOptions,
    OverwriteOption,
    SamplesOption,
    SeedOption,
    SplitOption,
    TemperatureOption,
    TokensOption,
    TraitOption,
)
from persona_lora.core.errors import UserError
from persona_lora.core.options import TaskOptions
from persona_lora.core.runs import Output
from persona_lora.core.settings import path_after_equals, path_before_equals, split_lists

if TYPE_CHECKING:
    from persona_lora.core.runs import Run
    from persona_lora.core.traits import Trait


@app.command("evaluate-checkpoints")
@with_groups
def evaluate_checkpoints(
    context: typer.Context,
    *,
    folder: Annotated[Path, typer.Argument(help="The folder of a finetune, with checkpoint-N.")],
    traits: Annotated[
        list[str], typer.Option(help='Traits to judge: repeated, or "evil anxious".')
    ],
    vectors: Annotated[
        list[str] | None, typer.Option(help='Vector files; repeated, or in one string: "v1 v2".')
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='As in "10 20" or "0-29"; about 0.55 of the depth.')
    ] = None,
    type: Annotated[
        str, typer.Option(help="proj (mean over the answer), prompt_last or prompt_avg.")
    ] = "proj",
    output: Annotated[
        Path | None, typer.Option(help="The run folder; results/checkpoints/<name of DIR>.")
    ] = None,
    finetuned_on: Annotated[
        str | None, typer.Option(help="The trait that the finetune was to teach.")
    ] = None,
    model: ModelOptions,
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    split: SplitOption = "eval",
    max_new_tokens: TokensOption = 80,
    temperature: TemperatureOption = 0.0,
    samples: SamplesOption = 1,
    seed: SeedOption = 0,
    batch_size: BatchOption = "auto",
    datasets_dir: DatasetsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Judge every checkpoint of a finetune, project it, and measure its shift from the base.

    Example: persona-lora evaluate-checkpoints checkpoints/finetunes/sycophancy_misaligned_2
    --traits sycophancy --vectors checkpoints/vectors/sycophancy/sycophancy_response_avg.safetensors
    --layers 19 --finetuned-on sycophancy
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.studies.drift import run as checkpoints

    if type not in TYPES:
        raise UserError(f"--type must be one of {', '.join(TYPES)}, got {type!r}")
    if not vectors:
        refuse_useless(context, "layers type", "without --vectors")
    checkpoints.find_checkpoints(folder)
    loaded = [load_trait(name, datasets_dir) for name in listed(traits, "--traits")]
    directions = load_vectors(vectors) if vectors else {}
    depth = next(iter(directions.values())).num_layers if directions else 0
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    base = load_model(model, directions.values())
    with progress_bars():
        run = checkpoints.evaluate_checkpoints(
            base,
            folder,
            checkpoints.Measures(
                tuple(loaded),
                directions,
                layer_numbers(layers, depth) if directions else (),
                TYPES[type],
                question_split(split),
                finetuned_on,
            ),
            lambda trait, reference: judge_factory(trait, reference, judging),
            judged_output(
                output or Path("results") / "checkpoints" / folder.name, overwrite, judging
            ),
            options=generation_options(max_new_tokens, temperature, samples, seed, batch_size),
        )
    console.print(_table(run))
    console.print(f"run: {run.folder}")


def _table(run: Run) -> Table:
    from persona_lora.report import wording

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("checkpoint", "asked on", "what", "vector", "layer", "mean", "95%"):
        table.add_column(heading, overflow="fold")  # names that differ at their ends stay apart
    for row in run.read("checkpoints"):
        table.add_row(
            row["checkpoint"],
            row["trait"],
            row["statistic"],
            row["vector"] or "",
            "" if row["layer"] is None else str(row["layer"]),
            wording.number(row["value"], 2),
            f"{wording.number(row['low'], 2)} … {wording.number(row['high'], 2)}",
        )
    return table


@app.command("predict-finetuning")
@with_groups
def predict_finetuning(
    context: typer.Context,
    *,
    finetunes: Annotated[
        list[str], typer.Option(help="Adapters of the same base; repeated, or in one string.")
    ],
    traits: Annotated[list[str], typer.Option(help='Traits to judge, as in "evil sycophancy".')],
    diffs: Annotated[list[str] | None, typer.Option(help="Diffs to project weights on.")] = None,
    vectors: Annotated[
        list[str] | None, typer.Option(help="Vectors to project hidden states on.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Of the vectors; about 0.55 deep.")] = None,
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("results/prediction"),
    model: ModelOptions,
    questions: Annotated[
        int | None, typer.Option(help="Only the first so many held-out questions of each trait.")
    ] = None,
    max_new_tokens: TokensOption = 60,
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    datasets_dir: DatasetsOption = None,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Do projections predict what finetuning does to character? Over many finetunes.

    Every finetune is judged on every trait and projected on every direction, in weights and in
    hidden states; the table holds correlations with intervals over finetunes.

    Example: persona-lora predict-finetuning --finetunes "checkpoints/a checkpoints/b …"
    --traits "evil sycophancy" --diffs "checkpoints/evil/diff checkpoints/sycophancy/diff"
    """
    from persona_lora.core.traits import load_trait
    from persona_lora.report import wording
    from persona_lora.studies.drift import prediction
    from persona_lora.studies.drift.read_prediction import contrasts, nulls, predict
    from persona_lora.studies.drift.weight_projection import load_diffs

    if not vectors:
        refuse_useless(context, "layer", "without --vectors")
    names = listed(finetunes, "--finetunes")
    loaded = load_vectors(vectors) if vectors else {}
    by_trait = {vector.trait or name: vector for name, vector in loaded.items()}
    depth = next(iter(loaded.values())).num_layers if loaded else 1
    study = prediction.DriftStudy(
        {name: _adapter(Path(name)) for name in names},
        [
            _first_questions(load_trait(name, datasets_dir), questions)
            for name in listed(traits, "--traits")
        ],
        load_diffs(listed(diffs, "--diffs")) if diffs else {},
        by_trait,
        layer_numbers(None if layer is None else str(layer), depth)[0] if loaded else 0,
    )
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    base = load_model(model, loaded.values())
    with progress_bars():
        run = prediction.predict_finetuning(
            base,
            study,
            lambda trait: judge_factory(trait, base, judging),
            Output(output, overwrite, inputs=judge_inputs(judging)),
            options=generation_options(max_new_tokens, 0.0, 1, seed, "auto"),
        )
    rows = run.read("judged"), run.read("predictors")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("predictor", "judged", "direction", "n", "r", "ρ", "p (Holm)", "error"):
        table.add_column(heading, no_wrap=True)
    for each in predict(*rows):
        table.add_row(
            each.kind,
            each.judged,
            each.direction,
            str(each.n),
            f"{wording.number(each.r, 2)} [{wording.number(each.r_low, 2)}, "
            f"{wording.number(each.r_high, 2)}]",
            wording.number(each.rho, 2),
            wording.p_value(each.p_holm),
            f"{each.error:.1f} / {each.plain_error:.1f}",
        )
    console.print(table)
    for contrast in contrasts(*rows):
        console.print(
            f"pooled r, {contrast.first} minus {contrast.second}: "
            f"{wording.number(contrast.difference, 2)} [{wording.number(contrast.low, 2)}, "
            f"{wording.number(contrast.high, 2)}] over {contrast.n} finetunes"
        )
    for null in nulls(*rows):
        console.print(
            f"{null.judged}: r {wording.number(null.r, 2)} with its own difference; random ones of "
            f"the same spectrum reach |r| {wording.number(null.high, 2)} in 95 of 100 (n {null.n}, "
            f"p {wording.p_value(null.p)})"
        )
    console.print(f"{run.folder / 'prediction.csv'} and {run.folder / 'prediction.png'}")


@app.command("compare-prevention")
@with_groups
def compare_prevention(
    context: typer.Context,
    *,
    finetunes: Annotated[
        list[str],
        typer.Option(
            help='"name=folder" of every finetune, the plain one first; or in one string.'
        ),
    ],
    trait: TraitOption,
    rows: Annotated[Path, typer.Option(help="The JSONL that all were finetuned on.")],
    correct: Annotated[
        list[str] | None,
        typer.Option(help='"folder=coefficient": a diff put on the first finetune afterwards.'),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help='As of benchmark; "" leaves capability out.')
    ] = "choice steps perplexity",
    limit: Annotated[int | None, typer.Option(help="Only so many items of each task.")] = None,
    questions: Annotated[
        int | None, typer.Option(help="Only the first so many held-out questions.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The run folder.")] = Path("results/prevention"),
    model: ModelOptions,
    max_new_tokens: TokensOption = 60,
    judge: JudgeOption = "embedding",
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_mode: JudgeModeOption = "logprobs",
    max_judge_cost: JudgeCostOption = None,
    datasets_dir: DatasetsOption = None,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare finetunes of one task, with and without prevention: trait, task loss, capability.

    The base model is always among them. All is paired with the first finetune, item by item.

    Example: persona-lora compare-prevention --trait evil --rows datasets/evil/misaligned_2.jsonl
    --finetunes "plain=checkpoints/a added=checkpoints/b" --correct "checkpoints/evil/diff=-1"
    """
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.core.traits import load_trait
    from persona_lora.report import wording
    from persona_lora.studies.drift import prevention

    if not tasks.split():
        refuse_useless(context, "limit", "without --tasks")
    named = dict(
        _pair(word, "--finetunes")
        for word in listed(finetunes, "--finetunes", whole=path_after_equals)
    )
    plain, *_ = named.values()
    models = {name: prevention.Finetuned(_adapter(Path(folder))) for name, folder in named.items()}
    models["base"] = prevention.Finetuned(None)
    for word in split_lists(correct or [], path_before_equals):
        folder, value = _pair(word, "--correct")
        diff = LoRADiff.load(folder)
        models[f"corrected {value}"] = prevention.Finetuned(
            _adapter(Path(plain)), (diff, _number(value))
        )
    judging = judge_options(judge, judge_model, judge_url, judge_mode, max_judge_cost, seed)
    base = load_model(model)
    asked = _first_questions(load_trait(trait, datasets_dir), questions)
    with progress_bars():
        scores = prevention.compare_prevention(
            base,
            models,
            asked,
            rows,
            judge_factory(asked, base, judging),
            Output(output, overwrite, inputs=judge_inputs(judging)),
            tasks=TaskOptions(
                tuple(tasks.replace(",", " ").split()), limit=limit, datasets_dir=datasets_dir
            ),
            options=generation_options(max_new_tokens, 0.0, 1, seed, "auto"),
        )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("measure", "model", "score", "n", "difference", "p (Holm)"):
        table.add_column(heading, no_wrap=True)
    for each in scores:
        digits = 0 if each.metric == "score" else 2
        table.add_row(
            each.measure,
            each.condition,
            wording.interval(each.score, digits),
            str(each.score.n),
            "" if each.difference is None else wording.interval(each.difference, digits),
            "" if each.p_holm is None else wording.p_value(each.p_holm),
        )
    console.print(table)
    console.print(f"{output / 'prevention.csv'} and {output / 'prevention.png'}")


def _pair(word: str, option: str) -> tuple[str, str]:
    first, found, second = word.rpartition("=") if option == "--correct" else word.partition("=")
    if not (first and found and second):
        raise UserError(f"{option} must be pairs with =, got {word!r}; see --help")
    return first, second


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--correct needs a coefficient after =, got {text!r}") from error


def _adapter(path: Path) -> Path:
    """Return the adapter of a finetune's folder, or the folder itself where it is one."""
    return path / "adapter" if (path / "adapter").is_dir() else path


def _first_questions(trait: Trait, number: int | None) -> Trait:
    if number is None:
        return trait
    kept = {split: texts[:number] for split, texts in trait.questions.items()}
    return dataclasses.replace(trait, questions=kept)
