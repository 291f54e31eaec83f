"""Finished runs as archives: pack one with its card, and hold its inputs and its rows against now.

Knows what runs record; refuses to know commands, and how one is run again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from persona_lora.core.archives import MANIFEST, files_below, write_archive
from persona_lora.core.content import numbered
from persona_lora.core.errors import UserError
from persona_lora.core.files import read_jsonl, read_text
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import CONFIG, RECORD, Run, deciding, first_difference
from persona_lora.core.traits import load_trait
from persona_lora.core.vector_files import load_vector
from persona_lora.models.embeddings import embedder_content
from persona_lora.models.load_options import DEFAULT_MODEL, LoadOptions
from persona_lora.models.loading import load_chat_model
from persona_lora.report import wording
from persona_lora.report.sections import Note, fill_template, provenance
from persona_lora.report.summary import SweepSummary
from persona_lora.report.trust import agreement_table
from persona_lora.studies.asking.run import Steering
from persona_lora.studies.report_page import SECTIONS, run_kind, section_of

CARD = "README.md"
PACKED = (".json", ".jsonl", ".yaml", ".csv", ".html", ".png", ".svg", ".md", ".txt")
SAME, CHANGED, GONE, UNKNOWN = "same", "changed", "not here", "not looked up"
Digests = Mapping[str, str]
PROMPT_FILES = ("positive_prompt", "negative_prompt")  # options, in place of a trait's own


def pack_run(folder: Path, target: Path, *, overwrite: bool = False) -> tuple[list[str], str]:
    """Write the archive of a finished run; return what was left out, and the manifest's digest.

    Raises UserError for a folder that is no run or holds an unfinished one, links, a file of the
    card's name, and a target that is there (unless ``overwrite``) or lies inside the run.
    """
    run, folder = finished_run(folder), folder.resolve()
    if folder in target.resolve().parents:
        raise UserError(f"{target} lies inside the run that it would hold; name another --output")
    if target.exists() and not (overwrite and target.is_file()):
        raise UserError(f"{target} exists; name another --output, or pass --overwrite for a file")
    files = files_below(folder)
    if CARD in files and MANIFEST not in files:
        raise UserError(f"{files[CARD]} is where the card of the archive goes; rename it")
    own = {name: path for name, path in files.items() if name not in (CARD, MANIFEST)}
    held = {name: path for name, path in own.items() if path.suffix in PACKED}
    left_out = [name for name in own if name not in held]
    return left_out, write_archive(target, held, {CARD: _card(run, held, left_out)})


def finished_run(folder: Path) -> Run:
    """Return the run in a folder; UserError where it, or one inside it, did not end well."""
    for path in (folder / RECORD, *sorted(folder.rglob(RECORD))):
        status = Run(path.parent).record["status"]
        if status != "finished":
            raise UserError(f"{path} says that the run is {status!r}; give its command again first")
    return Run(folder)


def command_of(folder: Path) -> str | None:
    """Return the words of the command that ``config.yaml`` is of; None without one."""
    path = folder / CONFIG
    first = read_text(path).partition("\n")[0] if path.is_file() else ""
    found = re.fullmatch(r"# persona-lora ([a-z -]+) --config config\.yaml", first)
    return None if found is None else found[1]


def _card(run: Run, files: Mapping[str, Path], left_out: list[str]) -> str:
    """Return what the run has recorded and what its report says, and nothing else."""
    record = run.record
    title, lead, caveats = str(record["command"]), "", list[str]()
    if run_kind(run) in SECTIONS:
        section = section_of(run, "")
        content = section.content
        title, lead = content.title, content.lead
        notes = [*section.warnings, *(each for each in content.blocks if isinstance(each, Note))]
        caveats = [f"{each.strong} {each.text}" for each in notes if each.style == "warning"]
        if isinstance(content.subject, SweepSummary):
            caveats += wording.gaps(content.subject)
    validation = [*run.read("validation"), *run.read("second_validation")]
    facts = [(name, " ".join(value.split())) for name, value in provenance(run, record)]
    return fill_template(
        "card.md.j2",
        title=title,
        lead=lead,
        command=command_of(run.folder) or record["command"],
        facts=[pair for pair in facts if pair[0] != "Run folder"],
        judges=agreement_table(validation).markdown() if validation else "",
        rows=[_counted(name, path) for name, path in files.items() if path.suffix == ".jsonl"],
        inputs=sorted(record.get("inputs", {}).items()),
        caveats=caveats,
        left_out=left_out,
    )


def _counted(name: str, path: Path) -> str:
    rows = read_jsonl(path)
    asked = {str(row["question_id"]) for row in rows if "question_id" in row}
    return f"`{name}`: n = {len(rows)}" + (f", on {len(asked)} questions" if asked else "")


# -- inputs ----------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where the inputs of a form of name lie, and how their digests are made."""

    names: str
    places: list[Path]
    digests: Callable[[], Digests]


def inputs_now(record: Mapping[str, Any], options: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return every input of a run, what has become of it, and where that was looked for.

    ``options`` are those of its command. Paths are taken from the working folder. What the record
    gives no place of, and a model on the hub or with code of its own, is not looked up.
    """
    named = record.get("inputs", {})
    found = dict.fromkeys(sorted(named), (UNKNOWN, ""))
    for names, places, digests in _sources(record, options):
        asked = [name for name in named if re.fullmatch(names, name)]
        at = ", ".join(map(str, places))
        if not all(path.exists() for path in places):
            found.update(dict.fromkeys(asked, (GONE, at)))
        elif asked:
            try:
                now = digests()
            except UserError as error:  # it can no longer be read, or no place was to be seen
                found.update(dict.fromkeys(asked, (CHANGED if places else GONE, str(error))))
                continue
            for name in (each for each in asked if each in now):
                found[name] = (SAME if now[name] == named[name] else CHANGED, at)
    return [(name, *state) for name, state in found.items()]


def _sources(record: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[Source]:
    config, named = record["config"], record.get("inputs", {})

    def paths(*keys: str) -> list[Path]:
        values = [config.get(key) or [] for key in keys]
        return [Path(p) for each in values for p in ([each] if isinstance(each, str) else each)]

    model, datasets = str(config.get("model")), options.get("datasets_dir")
    diffs, vectors = paths("diff", "diffs"), paths("vector_path", "vectors")
    local = [] if model == DEFAULT_MODEL else [Path(model)]
    on_hub = bool(local) and not local[0].exists() and len(local[0].parts) == 2
    if not on_hub and not config.get("trust_remote_code"):
        places = [*local, *paths("adapter")]
        yield Source("the model's (weights|tokenizer)", places, lambda: _model_now(config))
    if "trait" in options:
        roots = [] if datasets is None else [Path(datasets)]
        prompts = [Path(options[name]) for name in PROMPT_FILES if name in options]
        names = r"the trait .+|\S+\.jsonl of .+"
        yield Source(names, [*roots, *prompts], lambda: _trait_now(named, options))
    if diffs:
        names = r"(the (training|seed) of )?the diff|diff \d+"
        yield Source(
            names, diffs, lambda: Steering({LoRADiff.load(p): 1.0 for p in diffs}).inputs()
        )
    if vectors and record["command"] != "compare":  # which reads a part of its vector
        names = r"the vector|vector \d+"
        yield Source(
            names, vectors, lambda: numbered("vector", [load_vector(p).content() for p in vectors])
        )
    yield Source("the sentence embedder", [], lambda: {"the sentence embedder": embedder_content()})


def _trait_now(named: Digests, options: Mapping[str, Any]) -> Digests:
    """Return the digests of a trait as the command read it: all of it, or its first questions."""
    told = (options.get(name) for name in PROMPT_FILES)
    prompts = [None if path is None else read_text(path).strip() for path in told]
    datasets = options.get("datasets_dir")
    whole = load_trait(options["trait"], None if datasets is None else Path(datasets))
    whole = whole.prompted(*prompts)
    first = whole.first_questions(options.get("max_questions")).inputs()
    return first if named.items() >= first.items() else whole.inputs()


def _model_now(config: Mapping[str, Any]) -> Digests:
    known = [each.name for each in dataclasses.fields(LoadOptions) if each.name in config]
    loading, adapter = LoadOptions(**{name: config[name] for name in known}), config.get("adapter")
    name = str(config["model"])
    return load_chat_model(name, adapter=adapter, options=loading, allow_other_base=True).inputs()


# -- again -----------------------------------------------------------------------------------

TIMED = ("times.jsonl", "timings.jsonl", "judging.jsonl")  # no two runs have these in common


class Compared(NamedTuple):
    """Rows of one file, of a run and of the same run again.

    ``score`` is the largest difference, infinite where only one of the two has a score.
    """

    name: str
    equal: int
    rows: int
    score: float | None


def same_run(run: Run, output: Path) -> tuple[Run, str | None]:
    """Return the run below ``output`` that is this one again, and where it differs from it.

    UserError where there is none, or several of another configuration.
    """

    def decides(record: Mapping[str, Any]) -> Any:
        return deciding({key: record.get(key) for key in ("config", "seed", "inputs")})

    record = run.record
    found = [
        (each, first_difference(decides(record), decides(each.record)))
        for each in (Run(path.parent) for path in sorted(output.rglob(RECORD)))
        if each.record["command"] == record["command"]
    ]
    found = [pair for pair in found if pair[1] is None] or found
    if len(found) != 1:
        raise UserError(f"{output} holds {len(found)} runs like the recorded one, expected 1")
    return found[0]


def compare_rows(before: Path, after: Path) -> list[Compared]:
    """Return how the rows of two folders agree, file by file, but for those that hold times.

    Numbers within rounding are equal.
    """
    names = [name for name in files_below(before) if name.endswith(".jsonl")]
    return [
        _compared(name, *(Run(each).read(name.removesuffix(".jsonl")) for each in (before, after)))
        for name in names
        if Path(name).name not in TIMED
    ]


def _compared(name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Compared:
    pairs = list(zip(before, after, strict=False))
    equal = sum(first_difference(*pair) is None for pair in pairs)
    scores = [(old["score"], new.get("score")) for old, new in pairs if "score" in old]
    gaps = [
        (0.0 if old == new else math.inf) if None in (old, new) else abs(old - new)
        for old, new in scores
    ]
    return Compared(name, equal, max(len(before), len(after)), max(gaps, default=None))
