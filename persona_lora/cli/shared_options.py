"""The options that several commands share: one meaning, one help text each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from persona_lora.cli.config_file import read_defaults
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=read_defaults,
        help="A YAML file of this command's options (max_iterations: 10); flags override it.",
    ),
]
DEFAULT_COEFFICIENTS = "-2 -1.5 -1 -0.5 0 0.5 1 1.5 2"

ModelOption = Annotated[
    str, typer.Option(help="The packaged model, a local model folder, or a hub id.")
]
RevisionOption = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of a model on the hub.")
]
TraitOption = Annotated[str, typer.Option(help="A trait's name in datasets/, or its folder.")]
JudgeOption = Annotated[
    str,
    typer.Option(help="embedding (no network), openai (any endpoint), local, or several: a,b."),
]
JudgeModelOption = Annotated[
    str | None, typer.Option(help="The endpoint's model, or the local judge's.")
]
JudgeUrlOption = Annotated[str | None, typer.Option(help="Base URL of the judge's endpoint.")]
JudgeModeOption = Annotated[
    str, typer.Option(help="logprobs, or number for endpoints without logprobs.")
]
JudgeCostOption = Annotated[
    float | None, typer.Option(help="Stop asking the endpoint at this cost in dollars.")
]
TokensOption = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
SamplesOption = Annotated[int, typer.Option(help="Answers per question (temperature above 0).")]
SeedOption = Annotated[int, typer.Option(help="Seed of sampling and judging.")]
BatchOption = Annotated[str, typer.Option(help="Rows per batch, or auto.")]
SplitOption = Annotated[str, typer.Option(help="Which questions: eval, extract or ood.")]
OtherBaseOption = Annotated[
    bool, typer.Option(help="Use a diff on a model that it was not trained on.")
]
OverwriteOption = Annotated[bool, typer.Option(help="Replace a run of another configuration.")]
DatasetsOption = Annotated[
    Path | None, typer.Option("--datasets-dir", help="Where trait folders are.")
]
MethodOption = Annotated[
    str | None,
    typer.Option(help="lora, activation, prompt or none; told from the other options by default."),
]
VectorOption = Annotated[
    list[Path] | None,
    typer.Option(help="A steering vector (.safetensors or published .pt); may be repeated."),
]
LayersOption = Annotated[
    str | None,
    typer.Option(help='Decoder layers from 0, as in "16", "10 20" or "0-29"; about 0.55 deep.'),
]
PositionsOption = Annotated[
    str, typer.Option(help="Where vectors act: response, prompt or all tokens.")
]


@dataclass(frozen=True)
class StoredModelOptions:
    """A model whose files are read as they lie: there is no type and no place to choose."""

    model: ModelOption = DEFAULT_MODEL
    revision: RevisionOption = None


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The model that a command loads, and how."""

    model: ModelOption = DEFAULT_MODEL


@dataclass(frozen=True)
class AdaptedModelOptions(ModelOptions):
    """The same of a command that can put a finetune on the model first."""

    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter put on the model before anything else.")
    ] = None
