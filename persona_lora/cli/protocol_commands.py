"""Commands that come before a run: how large it must be, and what it will do, written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_lora.cli.console import progress_bars, show
from persona_lora.cli.program import command
from persona_lora.core.errors import UserError
from persona_lora.core.json_text import parse_json
from persona_lora.core.options import Seed
from persona_lora.core.protocol import LEAST_SCORED, LEVEL, Design, FrozenProtocol, Held
from persona_lora.core.runs import Run
from persona_lora.core.settings import yaml_text


@dataclass(frozen=True)
class Frozen:
    """What a protocol freezes; units, test and correction are those of the command's report."""

    command: Annotated[Held, "The command that is to be run."]
    questions: Annotated[Mapping[str, int], "How many are asked: eval=40,ood=16."]
    family: Annotated[
        tuple[Annotated[str, "may hold spaces"], ...],
        'The comparisons that are corrected together: "+1,+2", or "eval: activation".',
    ] = ()
    seeds: Annotated[int, "Training seeds of what is compared."] = 1
    level: Annotated[float, "The confidence level."] = LEVEL
    units: Annotated[str | None, "What is resampled; that of the command by default."] = None
    test: Annotated[str | None, "How differences are tested; as the command does by default."] = (
        None
    )
    correction: Annotated[str, "How p values of the family are corrected."] = "holm"
    least_scored: Annotated[
        float, "The share of questions that must be scored under every condition."
    ] = LEAST_SCORED
    settings: Annotated[
        dict[str, Any] | None, 'Values of the run\'s configuration: {"trait": "evil"}.'
    ] = None

    def protocol(self) -> FrozenProtocol:
        """Return the protocol; UserError for one that no report could follow."""
        usual = Design.of(self.command, self.questions, self.family, self.seeds)
        settings: Any = self.settings or {}
        if isinstance(settings, str):
            settings = parse_json(settings, '--settings (as in {"trait": "evil"})')
        if not isinstance(settings, Mapping):
            raise UserError(f'--settings must be like {{"trait": "evil"}}, got {self.settings}')
        given = {"units": self.units or usual.units, "test": self.test or usual.test}
        own = {"questions": usual.questions, "family": usual.family, "settings": dict(settings)}
        return FrozenProtocol(**{**vars(self), **given, **own})


@command("preregister")
def preregister(
    *, frozen: Frozen, output: Annotated[Path, "The YAML file to write."] = Path("protocol.yaml")
) -> None:
    """Write down what a run will ask and how it decides, and the hash of that, before it runs.

    Give the file to the run as --protocol: it is refused where it does anything else, and its
    report says that it was pre-registered. Publish the hash, or commit the file, to show when.

    Example: persona-lora preregister --command sweep --questions eval=40 --family=-1,+1
    --settings '{"trait": "evil", "coefficients": [-1, 0, 1]}' --output protocol.yaml
    """
    from persona_lora.core.files import write_text

    if output.exists():
        raise UserError(f"{output} exists; a protocol is not changed: name another --output")
    text = yaml_text(frozen.protocol().as_dict(), sort_keys=False)
    write_text(output, text)
    show(f"{output}", f"sha256 {FrozenProtocol.read(output).sha256}")


@command("plan")
def plan(
    *,
    pilot: Annotated[
        list[Path],
        typer.Argument(help="A sweep or compare, several being seeds; or a predict-finetuning."),
    ],
    effect: Annotated[
        float, "The smallest difference that matters, in points (of finetunes: a correlation)."
    ],
    power: Annotated[float, "The share of experiments that are to find it."] = 0.8,
    level: Annotated[float, "The confidence level."] = LEVEL,
    family: Annotated[int | None, "Comparisons corrected together; the pilot's by default."] = None,
    simulations: Annotated[int, "Experiments drawn for each size."] = 400,
    seed: Seed = 0,
) -> None:
    """Say how many questions and seeds (or finetunes) an effect needs, from what a pilot varied.

    Experiments of every size are simulated and tested as the reports test them; the p value must
    pass the first step of Holm's correction over the family.

    Example: persona-lora plan results/sweep/evil --effect 10
    """
    from persona_lora.report.power import plan_finetunes, plan_power
    from persona_lora.studies import read_pilot

    for name, share in (("power", power), ("level", level)):
        if not 0 < share < 1:
            raise UserError(f"--{name} must be between 0 and 1, got {share:g}")
    if simulations < 1 or (family is not None and family < 1):
        raise UserError("--simulations and --family must be at least 1")
    runs = [Run(path) for path in pilot]
    if len(runs) == 1 and runs[0].record["command"] == "predict-finetuning":
        within, comparisons = read_pilot.read_finetunes(runs[0])
        with progress_bars():
            alpha = (1 - level) / (family or comparisons)
            sizes = plan_finetunes(within, effect, alpha, simulations=simulations, seed=seed)
        table = read_pilot.power_table(sizes, "data sets", "finetune")
        show(table, read_pilot.finetunes_line(sizes, effect, power))
        return
    found, comparisons = read_pilot.read_pilot(runs)
    with progress_bars():
        alpha = (1 - level) / (family or comparisons)
        sizes, wider = (
            plan_power(each, effect, alpha, simulations=simulations, seed=seed)
            for each in (found, found.wider())
        )
    show(
        read_pilot.power_table(sizes),
        read_pilot.power_line(sizes, effect, power),
        read_pilot.wider_line(found, sizes, wider, power),
    )
