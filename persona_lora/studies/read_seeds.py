"""Several runs that differ only in the training seed of their diff, read as one.

Seeds are drawn as questions are (``report/two_way``): what is said holds for other seeds of this
training, where one run speaks of its own diff alone. Refuses runs, and diffs before anything is run
with them, that differ in anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persona_lora.core.chat import COHERENCE
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.runs import Run, first_difference
from persona_lora.report import wording
from persona_lora.report.comparisons import columns_of, write_found
from persona_lora.report.correction import (
    Errors,
    corrected_columns,
    errors_of,
    kind_of,
    less,
    of_condition,
    put_right,
)
from persona_lora.report.correction_tables import means_table
from persona_lora.report.curve import corrected
from persona_lora.report.resampling import SCORES, Interval
from persona_lora.report.scores import (
    JUDGE,
    SECOND,
    UNSTEERED,
    Condition,
    clusters,
    grouped,
    judges_of,
    marked,
    minus,
    question_means,
    score_answers,
)
from persona_lora.report.sections import Block, Heading, Note, Table
from persona_lora.report.summary import trait_of
from persona_lora.report.trust import standing
from persona_lora.report.two_judges import (
    Beside,
    Pair,
    TwoJudges,
    judges_table,
    lead_of,
    of_pairs,
    pairs_of,
)
from persona_lora.report.two_way import Gaps, mean_gap
from persona_lora.studies.steering.read_comparison import (
    ACTIVATION,
    LORA,
    RANDOM,
    RANDOM_LORA,
    MethodEffect,
    corrected_effects,
    effects_of,
    kinds_of_effect,
    read_comparison,
)

COMMANDS = ("evaluate", "sweep", "compare")
VERDICTS = "verdicts"
VECTOR = f"{ACTIVATION} beside {RANDOM}"
SEED = "the seed of the diff"
OF_ONE = ("the diff", SEED)  # inputs in which seeds may differ; so may random controls
CONTROLS = ("random diff", "random vector")
SAME_CONTROLS = "All seeds have the same random controls: what is said beside them holds for these."
REMEDY = "give what `train --seeds` made"
SET_BY_DIFF = ("diff", "diffs", "diff_norm", "controls")  # and these of the configuration


@dataclass(frozen=True)
class OverSeeds:
    """One condition over all seeds: means with their intervals over seeds and questions.

    ``change`` is from the unsteered model (of ``compare``: the diff's effect minus that of the
    method, and ``score`` the method's effect, ``score_p`` its test; of ``VECTOR`` the vector's
    minus that of random ones), ``p`` its test, ``p_holm`` corrected over all. ``judge`` names who
    judged, and what ends in ``_corrected`` is corrected for its error, None where nothing corrects
    it.
    """

    condition: str
    seeds: int
    score: Interval
    coherence: Interval | None = None
    change: Interval | None = None
    p: float | None = None
    p_holm: float | None = None
    score_p: float | None = None
    judge: str = ""
    score_corrected: Interval | None = None
    change_corrected: Interval | None = None


OF_THE_TRAIT = columns_of(
    *("score=score.mean", "low=score.low", "high=score.high", "change=change.mean"),
    *("change_low=change.low", "change_high=change.high", "p", "p_holm", JUDGE),
) | corrected_columns("score", "change")
COLUMNS = {
    **columns_of("condition", "seeds", "questions=score.n_questions", "coherence=coherence.mean"),
    **OF_THE_TRAIT,
}


def seeds_of_traits(folder: Path, traits: Sequence[str]) -> tuple[str, ...]:
    """Return the training seeds of traits' diffs, "seed0" …; ("",) where there is one diff each.

    Raises UserError where the traits have different ones, and for diffs that are no seeds of one
    training.
    """
    at = {trait: folder / trait for trait in traits}
    if all((path / "diff").exists() for path in at.values()):
        return ("",)
    own = {trait: tuple(diffs_of_seeds(path)) for trait, path in at.items()}
    (first, seeds), *others = own.items()
    for trait, other in others:
        if other != seeds:
            said = [f"{name} {', '.join(own[name]) or 'none'}" for name in (first, trait)]
            raise UserError(
                f"{folder}: the traits have different training seeds ({'; '.join(said)}); "
                "give each the same with train --seeds"
            )
    return seeds


def diffs_of_seeds(path: Path) -> dict[str, Path]:
    """Return the diffs of a folder that ``train --seeds`` made by "seed0" …, or ``path`` by "".

    Raises UserError for a seed whose training has not ended, and for diffs that are no seeds of
    one training: they could not be read together.
    """
    folders = [each for each in sorted(path.glob("seed*")) if each.is_dir()]
    found = {each.name: each / "diff" for each in folders if (each / "diff").is_dir()}
    lacking = [each for each in folders if each.name not in found]
    if not found:
        return {"": path}
    if lacking:
        raise UserError(f"{lacking[0]} holds no diff; train that seed to its end, or move it away")
    diffs = {at: LoRADiff.load(at, on_disk=True) for at in found.values()}
    first = next(iter(diffs.values()))
    for at, diff in diffs.items():
        difference = first_difference(_trained(first), _trained(diff))
        if difference is not None:
            raise UserError(f"{at} differs in more than its seed ({difference}); {REMEDY}")
    why = _same_seeds([each.training("the diff").get(SEED) for each in diffs.values()])
    if len(diffs) > 1 and why is not None:
        raise UserError(f"{path}: {why}; {REMEDY}")
    return found


def _trained(diff: LoRADiff) -> dict[str, Any]:
    training = {name: each for name, each in diff.training("the diff").items() if name != SEED}
    base = diff.base_model
    return {**training, "trait": diff.trait, "base": [base.name, base.fingerprint]}


def _same_seeds(seeds: Sequence[str | None]) -> str | None:
    """Say why seeds are not each one of its own; None where they are."""
    if None not in seeds and len(set(seeds)) == len(seeds):
        return None
    said = ", ".join("none" if each is None else each for each in seeds)
    return f"the diffs of the runs must each have a training seed of its own, got {said}"


def apart(runs: Sequence[Run]) -> str | None:
    """Say why runs are no seeds of one training; None where they are."""
    records = [run.record for run in runs]
    if records[0]["command"] not in COMMANDS or len(runs) < 2:
        return f"seeds are read over several runs of {', '.join(COMMANDS)}"
    for run, record in zip(runs, records, strict=True):
        if record["status"] != "finished":
            return f"{run.folder} is {record['status']}, and seeds are read once all are finished"
        found = first_difference(_fixed(records[0]), _fixed(record))
        if found is not None:
            return f"{run.folder} differs in more than the seed of its diff ({found})"
    return _same_seeds([record.get("inputs", {}).get(SEED) for record in records])


def _fixed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what seeds of one training have in common."""
    config, inputs = record["config"], record.get("inputs", {})
    return {
        "command": record["command"],
        "config": {name: each for name, each in config.items() if name not in SET_BY_DIFF},
        "inputs": {
            name: each
            for name, each in inputs.items()
            if name not in OF_ONE and not any(each in name for each in CONTROLS)
        },
        "protocol": record.get("protocol"),
        "seed": record["seed"],
    }


def over_seeds(runs: Sequence[Run], *, by: str = VERDICTS) -> list[OverSeeds]:
    """Return every condition over the seeds; UserError for runs that are no seeds of one.

    ``by`` is the file of the verdicts on the trait.
    """
    why = apart(runs)
    if why is not None:
        raise UserError(f"{why}; {REMEDY}")
    trait = trait_of(runs[0])
    if runs[0].record["command"] == "compare":
        found = _over_methods(runs, by)
    else:
        by_run, errors = [_scores(each, by) for each in runs], errors_of(runs[0], trait, by=by)
        finetuned = bool(runs[0].record["config"].get("adapter"))
        kinds = [kind_of(condition, finetuned=finetuned) for condition in by_run[0]]
        raw = corrected([_over_condition(condition, by_run) for condition in by_run[0]])
        found = [_put_right(*own, errors) for own in zip(raw, kinds, strict=True)]
    judge = _judges(runs, COHERENCE, by=by)
    return [replace(each, judge=judge) for each in found]


def _put_right(found: OverSeeds, kind: str | None, errors: Errors) -> OverSeeds:
    score, change = of_condition(kind, found.score, found.change, errors)
    return replace(found, score_corrected=score, change_corrected=change)


def _judges(runs: Sequence[Run], *beside: str, by: str = VERDICTS) -> str:
    """Return who judged the runs on their trait, and on what stands ``beside`` it."""
    of = trait_of(runs[0]), *beside
    return marked(*(judges_of(part.read(by), *of) for run in runs for part in _judged(run)))


Scores = dict[Condition, tuple[Gaps, ...]]  # trait and coherence, by question


def _scores(run: Run, by: str) -> Scores:
    trait = trait_of(run)
    scored = score_answers(run.read("answers"), run.read(by), trait)
    return {
        condition: tuple(question_means(clusters(rows, each)) for each in (trait, COHERENCE))
        for condition, rows in grouped(scored, lambda row: row.condition).items()
    }


def _over_condition(condition: Condition, by_run: Sequence[Scores]) -> OverSeeds:
    trait, coherence = (
        mean_gap([each[condition][at] for each in by_run], SCORES).interval for at in (0, 1)
    )
    name = wording.condition_label(condition.method, condition.coefficient)
    found = OverSeeds(name, len(by_run), trait, coherence)
    zero = next((c for c in by_run[0] if c.coefficient == 0 or c.method == UNSTEERED), None)
    if not condition.coefficient or zero is None:
        return found
    return _with_change(found, [minus(each[condition][0], each[zero][0]) for each in by_run])


def _over_methods(runs: Sequence[Run], by: str) -> list[OverSeeds]:
    by_run = [effects_of(run, by=by) for run in runs]
    found, beside, trait = [], [], trait_of(runs[0])
    for split, method in by_run[0]:
        own = [each[split, method] for each in by_run]
        effect, p = mean_gap(own)
        errors = errors_of(Run(runs[0].folder / split), trait, by=by)
        weights = kinds_of_effect(runs[0], method)
        right = put_right(effect, errors, weights)
        one = OverSeeds(f"{split}: {method}", len(runs), effect, score_p=p, score_corrected=right)
        if method != LORA:
            gaps = [minus(each[split, LORA], each[split, method]) for each in by_run]
            one, weights = _with_change(one, gaps), less(kinds_of_effect(runs[0], LORA), weights)
            one = replace(one, change_corrected=put_right(one.change, errors, weights))
        found.append(one)
        if method == RANDOM:
            vectors = [each[split, ACTIVATION] for each in by_run]
            vector = OverSeeds(f"{split}: {VECTOR}", len(runs), mean_gap(vectors).interval)
            beside.append(_with_change(vector, list(map(minus, vectors, own))))
    # The vector's own tests are a family of their own: a protocol names those of the diff.
    return [*corrected(found), *corrected(beside)]


def effects_over(runs: Sequence[Run]) -> dict[tuple[str, str], MethodEffect]:
    """Return every method's effect by split and method: of one comparison, or over its seeds."""
    alone = [each for run in runs for each in read_comparison(run).overall]
    found = {
        (e.split, e.method): MethodEffect(e.effect, e.difference, e.p_holm, effect_p=e.effect_p)
        for e in alone
    }
    if len(runs) > 1:
        found = {}
        for each in over_seeds(runs):
            split, _, method = each.condition.partition(": ")
            tests = each.change, each.p_holm
            found[split, method] = MethodEffect(each.score, *tests, effect_p=each.score_p)
    judge = _judges(runs)
    for place, own in grouped(alone, lambda each: (each.split, each.method)).items():
        strongest = max((each.most for each in own if each.most is not None), default=None)
        found[place] = replace(found[place], most=strongest, judge=judge)
    return found


def _with_change(found: OverSeeds, gaps: Sequence[Gaps]) -> OverSeeds:
    change, p = mean_gap(gaps)
    return replace(found, change=change, p=p)


def seeds_judges(runs: Sequence[Run], found: Sequence[OverSeeds]) -> TwoJudges | None:
    """Return what both judges say over the seeds; None where one judged alone."""
    trait, parts = trait_of(runs[0]), [(run, part) for run in runs for part in _judged(run)]
    if not all(part.read(SECOND) for _, part in parts):
        return None
    pairs = [pair for place in parts for pair in _pairs(*place, trait)]
    second = {each.condition: each.change for each in over_seeds(runs, by=SECOND)}
    effects = [
        Beside(each.condition, each.change, other)
        for each in found
        if each.change is not None and (other := second[each.condition]) is not None
    ]
    compared = runs[0].record["command"] == "compare"
    return of_pairs(trait, [part for _, part in parts], pairs, effects, by_place=not compared)


def _pairs(run: Run, part: Run, trait: str) -> list[Pair]:
    """Return both scores of a seed's answers, which are one draw of every condition."""
    split = "" if part is run else part.folder.name

    def name(condition: Condition) -> str:
        label = wording.condition_label(condition.method, condition.coefficient)
        return f"{split}: {condition.method}" if split else label

    found = pairs_of(part, trait, name, within=split)
    return [each._replace(draw=f"{run.folder} {each.draw}") for each in found]


def _judged(run: Run) -> list[Run]:
    """Return the runs that hold the answers of a run: of a comparison one for each split."""
    return [Run(run.folder / row["split"]) for row in run.read("splits")] or [run]


# -- in words ------------------------------------------------------------------------------------


def seeds_table(found: Sequence[OverSeeds]) -> Table:
    """Return every condition over the seeds."""
    rows = (
        [each.condition, wording.interval(each.score), wording.interval(each.coherence)]
        + [str(each.score.n_questions), *wording.gap(each.change, each.p_holm)]
        for each in found
    )
    return Table.of("condition | score | coherence | questions | change | pairs | p (Holm)", rows)


def seeds_lines(runs: Sequence[Run], found: Sequence[OverSeeds]) -> tuple[str, str]:
    """Return the first line of a report over seeds, and what it found, by both judges."""
    sentences = [standing(run, len(runs)) for run in runs]
    first = next((each for each in sentences if each.startswith("Exploratory")), sentences[0])
    both, trait = seeds_judges(runs, found), trait_of(runs[0])
    return first, lead_of(_finding(runs, found), both, _judged(runs[0])[0], trait)


def _finding(runs: Sequence[Run], found: Sequence[OverSeeds]) -> str:
    clear = [each for each in found if wording.clear_sign(each.change, each.p_holm)]
    said = ", ".join(f"{each.condition}: {wording.change(each.change)}" for each in clear)
    if all(each.score.low is None for each in found):
        return f"No intervals over seeds: {found[0].score.reason}."
    if all(each.change is None for each in found):  # of evaluate, which asks one condition
        means = ", ".join(f"{each.condition}: {wording.interval(each.score)}" for each in found)
        return f"Over {len(runs)} seeds: {means}."
    drawn = [{each["seed"] for each in run.record["config"].get("controls", ())} for run in runs]
    same = f" {SAME_CONTROLS}" if set.intersection(*drawn) else ""
    tested = [each for each in found if each.change is not None]
    rest = grouped(tested, lambda each: wording.unclear(each.change, each.p_holm))
    others = (f"{how}: {', '.join(e.condition for e in own)}" for how, own in rest.items() if how)
    told = "; ".join((said or "nothing", *others))
    return f"{_short(found)}Clear of 0 over {len(runs)} seeds (Holm): {told}.{same}"


def _short(found: Sequence[OverSeeds]) -> str:
    """Say which directions of a comparison did not beat their random controls; "" for none."""
    directions, said = {RANDOM_LORA: "weights", VECTOR: "activations"}, []
    for each in found:
        split, _, name = each.condition.partition(": ")
        if name in directions and wording.clear_sign(each.change, each.p_holm) < 1:
            gap = f"{wording.change(each.change)}, p {wording.p_value(each.p_holm)}"
            unclear = wording.unclear(each.change, each.p_holm, before="; ")
            said.append(f"{split}: {directions[name]} ({gap}{unclear})")
    return f"Not clearly further than random controls: {', '.join(said)}. " if said else ""


def seeds_blocks(runs: Sequence[Run]) -> tuple[Block, ...]:
    """Return several runs read as seeds, for a page; nothing where they are none."""
    if apart(runs) is not None:
        return ()
    found = over_seeds(runs)
    note = (
        "Means over seeds and questions, both drawn; the change is from the unsteered model (of a "
        "comparison: weights minus this, the vector minus random ones in a row of its own, and the "
        "score an effect); the larger p of Student’s t over both and of the questions’ signs, "
        "Holm-corrected."
    )
    heading = Heading(f"Over {len(runs)} training seeds")
    lines = (Note(line, "") for line in seeds_lines(runs, found))
    judges = judges_table(seeds_judges(runs, found))
    right = corrected_tables(runs, found)
    return (heading, *lines, seeds_table(found), Note(note), *right, *judges)


def corrected_tables(runs: Sequence[Run], found: Sequence[OverSeeds]) -> tuple[Table, ...]:
    """Return what was found over the seeds, raw and corrected; nothing where nothing was rated."""
    if runs[0].record["command"] == "compare":
        return corrected_effects(runs[0], effects_over(runs))
    rows = [
        (each.condition, *map(wording.interval, (each.score, each.score_corrected)))
        + tuple(map(wording.change, (each.change, each.change_corrected)))
        for each in found
        if each.score_corrected is not None
    ]
    columns = "Condition", "Raw", "Corrected [95%]", "Change, raw", "Change, corrected"
    return means_table(columns, rows, errors_of(runs[0], trait_of(runs[0])))


def write_seeds(folder: Path, runs: Sequence[Run]) -> list[OverSeeds]:
    """Read runs as seeds and write ``seeds.csv``, with what a second judge says."""
    found = over_seeds(runs)
    both = all(part.read(SECOND) for run in runs for part in _judged(run))
    second = over_seeds(runs, by=SECOND) if both else ()
    write_found(folder / "seeds.csv", COLUMNS, found, second, OF_THE_TRAIT)
    return found
