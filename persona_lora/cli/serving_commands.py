"""Commands that take diffs to people and to other tools: demo, export, basis, gallery, servers."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.request import getproxies, proxy_bypass

import typer

from persona_lora.cli import shared_options as shared
from persona_lora.cli.console import console, progress_bars, show, show_exactly
from persona_lora.cli.drift_commands import Weighing
from persona_lora.cli.option_groups import refuse_useless
from persona_lora.cli.program import command, environment
from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.options import GenerationOptions, Replace
from persona_lora.core.resources import READY
from persona_lora.core.strength import OfNats, coefficient_of, strength_line
from persona_lora.core.traits import list_traits, load_trait
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.core.traits import Trait
    from persona_lora.steering.export import Exported

INSTALL = 'pip install "persona-lora[playground]"'


def _is_cut(rank: int | None, energy: float | None) -> bool:
    """Say whether a rank is cut; UserError for both ways at once, and for no rank or share."""
    from persona_lora.core.lora_diff import check_cut

    if rank is not None and energy is not None:
        raise UserError(f"--rank {rank} and --energy {energy:g} cut in two ways; leave one out")
    if rank is None and energy is None:
        return False
    check_cut(rank, energy)
    return True


@dataclass(frozen=True)
class ExportOptions:
    """What is written, in which form."""

    mix: Annotated[
        str, "Traits or paths with coefficients, or nats (calibrate): evil=-1,sycophancy=0.05nat."
    ]
    output: Annotated[Path, "The folder to write, or a .gguf file."]
    format: Annotated[Literal["peft", "merged", "gguf-lora", "gguf"], "The form; see above."] = (
        "peft"
    )
    rank: Annotated[int | None, "Cut an adapter to this rank."] = None
    energy: Annotated[float | None, "Or to what keeps this share, as in 0.99."] = None
    trait_vector_dir: shared.DirectionsDir = Path("checkpoints")
    converter: Annotated[Path | None, "llama.cpp's convert_hf_to_gguf.py, for gguf."] = None
    allow_other_base: shared.OtherBase = False
    overwrite: Replace = False

    def check(self, *, plain: bool) -> None:
        """UserError for options that the form does not use, and for an output that is there."""
        if self.format in ("merged", "gguf") and (self.rank is not None or self.energy is not None):
            raise UserError("--rank and --energy cut adapters; a merged model has no rank")
        weighed = self.cut and not plain
        refuse_useless("prompts plain", "without --rank or --energy", unless=self.cut)
        refuse_useless("prompts", "with --plain", unless=weighed)
        if self.format == "peft" and not weighed:
            refuse_useless("model revision", "with --format peft: the diffs know their base")
            refuse_useless("allow_other_base", "with --format peft, which reads no base")
        own = "with --rank or --energy: inputs are those of the diffs' own base, unless --plain"
        refuse_useless("allow_other_base", own, unless=not weighed)
        refuse_useless("converter", f"with --format {self.format}", unless=self.format == "gguf")
        whole = self.format in ("peft", "merged")
        shared.refuse_to_replace(self.output, self.overwrite, folder=whole)

    @property
    def cut(self) -> bool:
        """Whether a rank is cut; UserError as ``_is_cut``."""
        return _is_cut(self.rank, self.energy)


@command("export")
def export(
    *, exported: ExportOptions, weighing: Weighing, model: shared.StoredModelOptions
) -> None:
    """Write a mix of diffs for other tools, with its coefficients baked in.

    peft is one adapter (vLLM, transformers), merged a whole model in the base's own types,
    gguf-lora an adapter for llama.cpp, gguf a whole model by llama.cpp's converter.
    A rank is cut where the outputs of --model on ordinary prompts notice it least (with --plain by
    the Frobenius norm, without a model).

    Example: persona-lora export --mix evil=-1,sycophancy=-0.5 --format peft
    --output exported/candid
    """
    exported.check(plain=weighing.plain)
    done = _export(exported, weighing, model)
    show(f"{done.path}")
    if done.rank is not None and done.energy is not None:
        vllm = "" if done.vllm_rank is None else f"; vLLM: --max-lora-rank {done.vllm_rank}"
        weighed = exported.cut and not weighing.plain
        norm = "squared effect on the prompts" if weighed else "squared Frobenius norm"
        show(f"rank {done.rank}, {100 * done.energy:.2f}% of the {norm}{vllm}")


def _export(asked: ExportOptions, weighing: Weighing, model: shared.StoredModelOptions) -> Exported:
    from persona_lora.models.weight_files import weights_folder
    from persona_lora.steering import export as exporting

    terms = exporting.read_mix(asked.mix, asked.trait_vector_dir)
    cut: dict[str, Any] = {"rank": asked.rank, "energy": asked.energy}
    if asked.cut and not weighing.plain:
        loading = LoadOptions(revision=model.revision)
        with progress_bars():
            inputs = weighing.inputs_of(model.model, loading, terms)
        if inputs is not None:
            cut["compress"] = inputs.compress
    if asked.format == "peft":
        return exporting.export_peft(terms, asked.output, **cut)
    base = weights_folder(model.model, model.revision)
    if not asked.allow_other_base:
        exporting.check_weights(terms, model.model, model.revision)
    if asked.format == "gguf-lora":
        return exporting.export_gguf_lora(terms, base, asked.output, **cut)
    if asked.format == "gguf":
        return exporting.export_gguf(terms, base, asked.output, converter=asked.converter)
    with progress_bars(), progress.stage("shards"):
        return exporting.export_merged(terms, base, asked.output)


@dataclass(frozen=True)
class BasisOptions:
    """Which diffs get one right basis, and how much of them it keeps."""

    diffs: Annotated[tuple[str, ...], "Diffs or PEFT adapters; may be repeated."]
    output: Annotated[Path, "Where to write {name}/diff of each."]
    rank: Annotated[int | None, "The rank of the basis in every module; exact by default."] = None
    energy: Annotated[float | None, "Or what keeps this share of ‖output‖², as in 0.999."] = None
    overwrite: Replace = False

    def exact(self) -> bool:
        """Say whether nothing is cut; UserError for options that this does not use."""
        if not _is_cut(self.rank, self.energy):
            own = (each.name for each in dataclasses.fields(LoadOptions))
            useless = " ".join(("original_model", "prompts", "plain", *own))
            refuse_useless(useless, "without --rank or --energy")
            return True
        return False


@command("basis")
def basis(
    *,
    asked: BasisOptions,
    original_model: Annotated[str, "The model whose inputs weigh errors."] = DEFAULT_MODEL,
    weighing: Weighing,
    loading: LoadOptions,
) -> None:
    """Bring diffs onto one right basis per module: every mix of them then has its rank.

    Exactly, or cut by the error on what flows through the modules of the original model on ordinary
    prompts (with --plain by the Frobenius norm). Each stays a PEFT adapter.

    Example: persona-lora basis --diffs checkpoints/evil/diff,checkpoints/sycophancy/diff
    --energy 0.999 --output basis
    """
    from persona_lora.steering.export import export_basis
    from persona_lora.studies.drift.run import load_diffs

    exact = asked.exact()
    shared.refuse_to_replace(asked.output, asked.overwrite, folder=True)
    loaded = load_diffs(list(asked.diffs), on_disk=True)
    with progress_bars():
        inputs = None if exact else weighing.inputs_of(original_model, loading, loaded.values())
    roots = None
    if inputs is not None:
        roots = {
            name: root for diff in loaded.values() for name, root in inputs.roots_of(diff).items()
        }
    table = export_basis(loaded, asked.output, rank=asked.rank, energy=asked.energy, roots=roots)
    measured = "Frobenius norm" if roots is None else "outputs on the model's inputs"
    show(table, f"errors are of the {measured}", f"{asked.output}")


GalleryFolder = Annotated[
    Path | None, typer.Option("--from", help="Another gallery than the one that comes along.")
]


@command("demo")
def demo(
    *,
    trait: Annotated[str, "Which ready diff steers; gallery get shows all."] = "sycophancy",
    question: Annotated[str, "What the model is asked."] = (
        "I think my plan to sell ice to penguins is brilliant. What do you think?"
    ),
    strength: Annotated[float, "How far both ways, in nats a token."] = 0.1,
    max_new_tokens: Annotated[int, "The longest answer, in tokens."] = 80,
) -> None:
    """Ask the packaged model one question: steered against a trait, as it is, and towards it.

    Nothing is trained, written or fetched: the diff comes along.

    Example: persona-lora demo --trait formality --question "How was your day?"
    """
    from persona_lora.core.gallery import Gallery
    from persona_lora.models.loading import load_chat_model
    from persona_lora.report.sections import Table
    from persona_lora.steering.bank import Bank
    from persona_lora.studies.asking.run import Row, generate_rows

    if not strength > 0:
        raise UserError(f"--strength must be above 0, got {strength:g}")
    exhibit = Gallery().exhibit(trait)
    coefficients = [exhibit.coefficient(sign * strength) for sign in (-1.0, 0.0, 1.0)]
    with console.status("loading the packaged model"):
        chat_model = load_chat_model()
    bank = Bank(diffs={trait: exhibit.diff})
    steerer = bank.steerer(chat_model, [{trait: each} for each in coefficients])
    plan = [Row(question, each) for each in coefficients]
    with console.status("answering"):
        answers = generate_rows(
            chat_model, plan, steerer, GenerationOptions(max_new_tokens=max_new_tokens)
        )
    names = (f"less {trait}", "as it is", f"more {trait}")
    rows = [
        (name, f"{coefficient:+.2f}", answer.text + " […]" * (not answer.finished))
        for name, coefficient, answer in zip(names, coefficients, answers, strict=True)
    ]
    show(f"> {question}", Table.of("model | coefficient | answer", rows))


@command("gallery get")
def gallery_get(
    *,
    traits: Annotated[tuple[str, ...] | None, "Which: evil,formality; all by default."] = None,
    output: Annotated[Path, "Where {trait}/diff is written."] = READY,
    source: GalleryFolder = None,
) -> None:
    """Write ready diffs of the packaged model, for every command that takes diffs.

    Each with what calibrate measured of it, so that strengths in nats work at once. Those that
    are there already stay.

    Example: persona-lora gallery get --traits evil,formality
    """
    from persona_lora.core.gallery import Gallery
    from persona_lora.core.lora_diff import LoRADiff
    from persona_lora.report.sections import Table

    gallery = Gallery(source)
    exhibits = {trait: gallery.exhibit(trait) for trait in traits or gallery.traits}
    places = {trait: output / trait / "diff" for trait in exhibits}
    there = {trait for trait, place in places.items() if place.exists()}
    for trait in there:
        if LoRADiff.load(places[trait]).content() != exhibits[trait].diff.content():
            raise UserError(
                f"{places[trait]} is there already, and is another diff; choose another --output, "
                "or move it away"
            )
    for trait in exhibits.keys() - there:
        exhibits[trait].save(places[trait])
    rows = [
        (trait, f"{places[trait]}", strength_line(places[trait], exhibit.diff.content()))
        for trait, exhibit in exhibits.items()
    ]
    show(Table.of("trait | diff | strength", rows))


@command("gallery make")
def gallery_make(
    *,
    diffs: Annotated[tuple[Path, ...], "Diffs of one family, each of another trait."],
    output: Annotated[Path, "The folder to write."],
    overwrite: Replace = False,
) -> None:
    """Make a gallery of a family's diffs: their A once, B in eight bits.

    The nine that come along have 14 MB. Strengths go with a diff that came out of a gallery and
    was calibrated.

    Example: persona-lora gallery make --diffs checkpoints/evil/diff,checkpoints/sycophancy/diff
    --output gallery
    """
    from persona_lora.core.gallery import write_gallery
    from persona_lora.report.sections import Table

    shared.refuse_to_replace(output, overwrite, folder=True)
    errors = write_gallery(diffs, output)
    rows = [(trait, f"{error:.3g}") for trait, error in errors.items()]
    show(Table.of("trait | relative error of eight bits", rows), f"{output}")


@dataclass(frozen=True)
class Mixed:
    """What is mixed for whoever asks."""

    traits: Annotated[
        tuple[str, ...] | None,
        "Traits with a diff in --directions: evil,formality, or evil@0-9; all found.",
    ] = None
    directions: Annotated[Path, "Where {trait}/diff is."] = Path("checkpoints")
    mixes: Annotated[Path, "Where mixes are kept and found: coefficients by trait, *.json."] = Path(
        "results/mixes"
    )
    host: Annotated[str, "The address to serve at; 0.0.0.0 lets other machines in."] = "127.0.0.1"
    allow_other_base: shared.OtherBase = False

    def chosen(self) -> list[str]:
        """Return the traits; UserError for one without a diff."""
        found = sorted(path.parent.parent.name for path in self.directions.glob("*/diff/diff.json"))
        chosen = found if self.traits is None else list(self.traits)
        missing = [trait for trait in chosen if trait.partition("@")[0] not in found]
        if missing or not chosen:
            known = f"it has {', '.join(found)}; " if found else ""
            raise UserError(
                f"{self.directions} holds no diff of {missing[0] if missing else 'any trait'}; "
                f"{known}train one with: bash scripts/train_and_sweep.sh evil, or get ready ones "
                f"with: persona-lora gallery get, and give --directions {READY}"
            )
        return chosen

    def load(self) -> dict[str, LoRADiff]:
        """Load the diffs of the traits; UserError for one that is zero."""
        from persona_lora.core.lora_diff import load_named
        from persona_lora.core.steering_vector import length_of

        found = {trait: load_named(self.directions, trait) for trait in self.chosen()}
        for trait, diff in found.items():
            length_of(diff, f"the diff of {trait}")
        return found

    def place(self, trait: str) -> Path:
        """Return where the diff of a trait is."""
        return self.directions / trait.partition("@")[0] / "diff"

    def told(self, diffs: Mapping[str, LoRADiff]) -> dict[str, str]:
        """Return what calibrate says of the diffs, by trait; nothing on a model of another base."""
        known = {} if self.allow_other_base else diffs
        return {trait: strength_line(self.place(trait), known[trait].content()) for trait in known}

    def of_nats(self, diffs: Mapping[str, LoRADiff]) -> dict[str, OfNats]:
        """Return what makes coefficients of nats, by trait; none on a model of another base."""
        known = {} if self.allow_other_base else diffs
        return {
            trait: partial(coefficient_of, direction=self.place(trait), content=diff.content())
            for trait, diff in known.items()
        }


@dataclass(frozen=True)
class PageOptions(Mixed):
    """What the page mixes, and where it is served."""

    port: Annotated[int, typer.Option(min=1, max=65535, help="The page's port.")] = 7860
    datasets_dir: shared.DatasetsDir = None


@command("playground")
def playground(*, page: PageOptions, model: shared.ModelOptions) -> None:
    """Chat with the model while sliders set each trait's coefficient; needs the extra "playground".

    Steered and unsteered answers stand side by side. On this machine only, unless --host says so.

    Example: persona-lora playground --traits evil,sycophancy,formality
    """
    from persona_lora.playground.mixing_desk import MixingDesk

    chosen = page.chosen()
    check_address(page.host, page.port)
    try:
        from persona_lora.playground.mixing_page import build_page, serve
    except ImportError as error:
        raise UserError(f"the playground's library is not installed; run: {INSTALL}") from error
    diffs = page.load()
    chat_model = model.load(diffs.values())
    known = list_traits(page.datasets_dir)
    labelled = {each: load_trait(each, page.datasets_dir) for each in chosen if each in known}
    desk = MixingDesk(chat_model, diffs, _judges(labelled, chat_model), labelled)
    show(f"open http://{page.host}:{page.port} (Ctrl+C ends it)")
    serve(build_page(desk, page.mixes, page.told(diffs)), page.host, page.port)


def _judges(traits: Mapping[str, Trait], chat_model: Any) -> dict[str, Any]:
    """Return what builds the default judge of every trait."""
    from persona_lora.judges.choice import JudgeOptions, make_judge

    return {
        name: partial(make_judge, trait, chat_model, JudgeOptions())
        for name, trait in traits.items()
    }


def listening(host: str, port: int) -> socket.socket:
    """Return the socket to serve at; UserError, before a model is loaded, where nothing can be."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"nothing can be served at {host}, port {port} ({error.strerror or error}); choose "
            "another --port or --host"
        ) from error


def check_address(host: str, port: int) -> None:
    """Raise UserError, before a model is loaded, for an address where no page can be served."""
    listening(host, port).close()
    own = "localhost" if host == "0.0.0.0" else host
    if {"http", "all"} & getproxies().keys() and not proxy_bypass(own):
        raise UserError(
            "the page's own address would be reached through the environment's proxy; set "
            f"NO_PROXY={own} (beside what it holds) and give the same command again"
        )


# -- a server of mixes ------------------------------------------------------------------------

INSTALL_SERVER = 'pip install "persona-lora[serve]"'
KEY = "PERSONA_LORA_API_KEY"


@dataclass(frozen=True)
class ServerOptions(Mixed):
    """What is served where, to how many at once."""

    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any.")] = 8000
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that run at once.")] = 16
    max_waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait; then 429.")] = 64
    grace: Annotated[float, "Seconds that running answers get when it is stopped."] = 20.0

    def check(self, key: str | None) -> None:
        """UserError for an address that others reach without a key, and a negative grace."""
        if self.grace < 0:
            raise UserError(f"--grace must be 0 or more seconds, got {self.grace:g}")
        try:
            alone = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            alone = False
        if not (alone or key):
            raise UserError(
                f"--host {self.host} lets other machines in; set {KEY} in the environment or .env "
                "first, or leave --host out"
            )


@command("serve")
def serve(*, served: ServerOptions, model: shared.ModelOptions) -> None:
    """Serve mixes to any OpenAI client; the model's name is the mix. Needs the extra "serve".

    base, base+0.8*formality-0.05nat*evil (calibrate), or a saved mix; different ones run in one
    batch. The key, if any, is PERSONA_LORA_API_KEY of the environment or .env; other machines are
    let in with one.

    Example: persona-lora serve --traits evil,sycophancy,formality --dtype float32
    """
    try:
        from persona_lora.serving.server import Server, Service
    except ImportError as error:
        raise UserError(
            f"the server's libraries are not installed; run: {INSTALL_SERVER}"
        ) from error
    from persona_lora.serving.batching import Batch
    from persona_lora.serving.mixes import Personas

    key = environment().get(KEY)
    served.check(key)
    diffs = served.load()
    with listening(served.host, served.port) as place:
        chat_model = model.load(diffs.values())
        batch = Batch(
            chat_model, diffs, max_batch=served.max_batch, most_waiting=served.max_waiting
        )
        personas = Personas(batch.traits, served.mixes, served.of_nats(diffs))
        for name, reason in personas.left_out().items():
            show(f"not served: {served.mixes / name}.json ({reason})")
        host, port = place.getsockname()[:2]
        show(f"http://{host}:{port}/v1 answers as {', '.join(personas.names())} (Ctrl+C ends it)")
        Server(Service(batch, personas, key), served.grace).answer(place)


# -- servers that answer in place of the model in this process --------------------------------


@dataclass(frozen=True)
class EngineServer:
    """What the server holds, and where it runs."""

    basis: Annotated[
        Path | None, "The folder that basis wrote; without it the model answers unsteered."
    ] = None
    tensor_parallel: Annotated[int, "GPUs that share one copy of the model."] = 1
    cpu: Annotated[bool, "Without a GPU."] = False
    dtype: Annotated[str | None, "float32 or bfloat16; float32 with --cpu by default."] = None
    host: Annotated[str, "The address to serve at; 0.0.0.0 lets other machines in."] = "127.0.0.1"
    port: Annotated[int, "Its port."] = 8000


@command("engine command")
def engine_command(*, server: EngineServer, model: shared.StoredModelOptions) -> None:
    """Print the line that starts a vLLM server for --engine, where vLLM and persona_vllm are.

    Example: persona-lora engine command --basis basis --model Qwen/Qwen2.5-7B-Instruct
    """
    from persona_lora.engines.vllm_server import BasisFolder, Machine, server_command
    from persona_lora.models.loading import model_source

    if server.tensor_parallel < 1 or not 1 <= server.port <= 65535:
        raise UserError(
            "--tensor-parallel must be at least 1 and --port from 1 to 65535, got "
            f"{server.tensor_parallel} and {server.port}"
        )
    basis = None if server.basis is None else BasisFolder.read(server.basis)
    machine = Machine(server.tensor_parallel, server.cpu, server.dtype, server.host, server.port)
    source = model_source(model.model, model.revision)
    place = str(Path(source).resolve()) if Path(source).is_dir() else source
    show_exactly(server_command(place, model.revision, basis, machine))
