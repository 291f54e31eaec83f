"""The groups of options that several commands share: one meaning, one help text each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from persona_lora.core.errors import UserError
from persona_lora.core.options import Overwrite, Positions
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions

Model = Annotated[str, "The packaged model, a local model folder, or a hub id."]
Trait = Annotated[str, "A trait's name in datasets/, or its folder."]
DatasetsDir = Annotated[Path | None, "Where trait folders are."]
OtherBase = Annotated[bool, "Use a direction on a model that it was not made on."]
DirectionsDir = Annotated[Path, "Where directions are: {trait}/diff, and vectors/{trait}/."]
PersonaDir = Annotated[Path | None, "Where persona folders are."]
Layers = Annotated[
    str | None, 'Decoder layers from 0, as in "16", "10,20" or "0-29"; about 0.55 deep by default.'
]
MaxQuestions = Annotated[int | None, "Use only the first N questions."]
Vectors = Annotated[tuple[Path, ...], "Steering vectors (.safetensors or published .pt)."]
Diffs = Annotated[tuple[Path, ...], "Diffs: folders, PEFT adapters, or files of them."]


@dataclass(frozen=True)
class StoredModelOptions:
    """A model whose files are read as they lie: there is no type and no place to choose."""

    model: Model = DEFAULT_MODEL
    revision: Annotated[str | None, "A branch, tag or commit of a model on the hub."] = None


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The model that a command loads, and how."""

    model: Model = DEFAULT_MODEL


@dataclass(frozen=True)
class AdaptedModelOptions(ModelOptions):
    """The same of a command that can put a finetune on the model first."""

    adapter: Annotated[Path | None, "A PEFT adapter put on the model before anything else."] = None

    def worn(self) -> dict[str, Any]:
        """Return what a run's configuration keeps of the adapter."""
        return {"adapter": None if self.adapter is None else str(self.adapter)}


@dataclass(frozen=True)
class TraitOptions:
    """The trait that a command is about."""

    trait: Trait
    datasets_dir: DatasetsDir = None


@dataclass(frozen=True)
class RunOptions:
    """The folder of a run, and what becomes of another run in it."""

    output: Annotated[
        Path | None,
        "The folder of the run; by default one in results/ named after the input.",
        *("--output", "--output-dir"),
    ] = None
    overwrite: Overwrite = False

    @property
    def folder(self) -> Path:
        """The folder, of a command that has a default for it."""
        if self.output is None:
            raise UserError("--output is missing; name the folder of the run")
        return self.output


Steering = Literal["lora", "activation", "prompt", "none"]
Method = Annotated[Steering | None, "The way of steering; told from the other options by default."]


@dataclass(frozen=True)
class MixOptions:
    """Directions that act at once, each with its coefficient, and where they act."""

    diff: Diffs = ()
    vector: Vectors = ()
    coefficient: Annotated[
        tuple[float, ...], "A coefficient for each diff or vector; 1 by default."
    ] = ()
    layers: Layers = None
    positions: Annotated[Positions, "Where vectors act: on which tokens."] = "response"
    allow_other_base: OtherBase = False
