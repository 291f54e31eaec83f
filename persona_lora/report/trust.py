"""What a report says of its run and its judge before any number is read.

Pre-registered or exploratory, and on how many seeds it rests: a run is held to its protocol when it
starts (``core/protocol``), and what only its rows can tell, how many of the planned questions were
scored at all, is read here. How fit the judge is, what fooled it, means corrected for its error:
read from the rows that judging a run leaves (``validation``, ``canaries``). Refuses to know judges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from persona_lora.core.chat import COHERENCE, Condition
from persona_lora.core.runs import Run
from persona_lora.report import rated, wording
from persona_lora.report.correction import errors_of, kind_of, of_condition
from persona_lora.report.correction_tables import means_table
from persona_lora.report.resampling import SCORES, bootstrap_mean
from persona_lora.report.scores import Row, grouped, judges_of, marked, score_answers
from persona_lora.report.sections import Block, Heading, Note, Table

HASH_SHOWN = 12
TRAINED = (
    "diff",
    "diffs",
    "diff_norm",
    "adapter",
    "finetunes",
)  # what a configuration calls a trained LoRA


def standing(run: Run, seeds: int = 1) -> str:
    """Return "Pre-registered (sha256 0f3a…), one seed.", or why the run is exploratory."""
    record = run.record
    protocol, trained = record.get("protocol"), any(map(record["config"].get, TRAINED))
    said = "one seed" if seeds == 1 else f"{seeds} seeds"
    on = f", {said}." if trained or seeds > 1 else "."
    if protocol is None:
        return f"Exploratory{on}"
    named = f"sha256 {protocol['sha256'][:HASH_SHOWN]}…"
    deviated = next(_deviations(run, protocol), None)
    if deviated is None:
        return f"Pre-registered ({named}){on}"
    return f"Exploratory (it deviates from its protocol, {named}: {deviated}){on}"


def _deviations(run: Run, protocol: Row) -> Iterator[str]:
    status = run.record["status"]
    if status != "finished":
        yield f"the run is recorded as “{status}”"
    asked: dict[tuple[Any, ...], dict[Any, bool]] = {}
    for condition, question, scored in _asked(run):
        questions = asked.setdefault(condition, {})
        questions[question] = scored or questions.get(question, False)
    for (condition, *_), questions in asked.items():
        share = sum(questions.values()) / len(questions)
        if share < protocol["least_scored"]:
            yield (
                f"{100 * share:.0f}% of the questions were scored under {condition}, "
                f"{100 * protocol['least_scored']:.0f}% were to be"
            )


def _answered(run: Run) -> list[Run]:
    """Return the runs that hold a study's answers: of each split, of each model and trait."""
    parts = [run.folder / row["split"] for row in run.read("splits")]
    places = ("answers/*/run.json", "answers/*/*/run.json")
    return [Run(path) for path in parts] + [
        Run(path) for path in sorted(p.parent for at in places for p in run.folder.glob(at))
    ]


def judges_behind(run: Run, *criteria: str) -> str:
    """Return who judged a run's answers, wherever a study keeps them, as ``marked`` has it."""
    parts = _answered(run) or [run]
    return marked(*(judges_of(part.read("verdicts"), *criteria) for part in parts))


def _asked(run: Run) -> Iterator[tuple[tuple[Any, ...], Any, bool]]:
    """Return the condition and question of every answer of a run, and whether it was scored.

    A condition is what it is called, with all that tells it from others.
    """
    trait = run.record["config"].get("trait")
    for part in _answered(run) or [run]:
        criterion = trait or part.record["config"].get("trait")
        scored = {
            row["row"]
            for row in part.read("verdicts")
            if row["criterion"] == criterion and row["score"] is not None
        }
        for row in part.read("answers"):
            value = "" if row["coefficient"] is None else f" {row['coefficient']:+.3g}"
            layer = "" if row.get("layer") is None else f" at {wording.layers(row['layer'])}"
            place = "" if part is run else f" ({part.folder.relative_to(run.folder)})"
            condition = f"{row['method']}{value}{layer}{place}", row["coefficient"]
            yield condition, row["question_id"], row["row"] in scored
    for row in run.read("held_out"):
        asked = row.get("persona"), row["prompt_id"]
        yield (row["condition"],), asked, row["score"] is not None


WEAK_AUC = 0.8
OF = "of"  # the trait whose labels and nonsense a row on coherence is of, where several are kept
FITNESS = {True: "yes", False: "unfit", None: "not known"}


def judge_blocks(run: Run) -> tuple[Block, ...]:
    """Return how the judges agree with labels, what they made of nonsense, corrected means."""
    rows, second = run.read("validation"), run.read("second_validation")
    if not rows:
        none = "This run holds no validation of its judge against labelled answers."
        return (Heading("Judge"), Note(none))
    tables = (agreement_table([*rows, *second]), *_parts(rows))
    return (*tables, *_time(run), *canaries_tables(_shown(run)), *_corrected(run, rows))


def _time(run: Run) -> tuple[Note, ...]:
    """Return what judging took; calls that went on with a run are added up."""
    took: dict[str, tuple[int, float]] = {}
    for row in run.read("judging"):
        answers, seconds = took.get(row["judge"], (0, 0.0))
        took[row["judge"]] = answers + row["answers"], seconds + row["seconds"]
    said = "; ".join(
        f"{judge} {wording.number(seconds, 1)} s for {answers} verdicts"
        for judge, (answers, seconds) in took.items()
    )
    return (Note(f"Judging, with building and validating the judge, took: {said}."),) * bool(said)


def weak_judges(run: Run) -> tuple[Note, ...]:
    """Return a warning for each nonsense that a judge liked, and each criterion it is weak on.

    A study keeps it with the answers of each split or model, of its own traits. Of the second
    judge, whose fitness stands beside its numbers, what fooled it alone.
    """
    model = run.record["config"].get("model")
    said = [
        *(
            f"The judge “{row['judge']}” gives {wording.number(row['score'])} of 100 on "
            f"{_criterion(row)} to nonsense ({row['name']}); what it reads may not be the trait."
            for row in _kept(run, "canaries", "second_canaries")
            if not row["caught"]
        ),
        *(text for row in _kept(run, "validation") if (text := _weakness(row, model))),
    ]
    return tuple(Note(text, "warning", "Read with caution.") for text in dict.fromkeys(said))


def _kept(run: Run, *names: str) -> Iterator[Row]:
    parts = [run, *_answered(run)]
    for name in names:
        yield from {str(row): row for part in parts for row in part.read(name)}.values()


def _weakness(row: Row, model: Any) -> str:
    own, auc = row.get("own"), row["auc"]
    judge = f"the judge “{row['judge']}”"
    if own is not None:
        of_it = rated.of_model(own["compared"], model)
        found = [("a model’s", own["within"])]
        if (rho := rated.within(of_it)) is not None:
            found.append((f"{rated.model_of(of_it[0])}’s", rho))
        for whose, rho in found:
            if rho is None or rho < rated.FIT_WITHIN:
                return (
                    f"On {_criterion(row)} {judge} is unfit: among {whose} own answers under one "
                    f"condition its ρ with blind ratings is {wording.number(rho, 2)}, and "
                    f"{rated.FIT_WITHIN} is asked for."
                )
    if auc is None or auc < WEAK_AUC:
        kind = "hand-labelled answers" if own is None else "rated answers"
        return (
            f"On {kind} {judge} reaches an AUC of {wording.number(auc, 2)} for {_criterion(row)}; "
            f"below {WEAK_AUC} its scores say little."
        )
    return ""


def _criterion(row: Row) -> str:
    """Return what a row on a judge is about: "evil", "coherence", "coherence (evil)"."""
    return f"{row['criterion']} ({row[OF]})" if OF in row else str(row["criterion"])


def agreement_table(rows: Sequence[Row]) -> Table:
    """Return how judges agree with labels, a line for each criterion."""
    cells = tuple(
        (
            _criterion(row),
            str(row["judge"]),
            "written" if (own := row.get("own")) is None else "models’ own",
            str(int(row["n"])),
            f"{wording.number(100 * float(row['coverage']))}%",
            wording.number(row["auc"], 2),
            wording.number(row["spearman"], 2),
            "–" if own is None else wording.number(own["within"], 2),
            "–" if own is None else wording.number(own["calibration_error"]),
            FITNESS[row.get("fit")],
        )
        for row in rows
    )
    columns = (
        *("Criterion", "Judge", "Labelled\nanswers", "n", "Scored", "AUC", "ρ"),
        *("ρ within\na condition", "ECE,\npoints", "Fit"),
    )
    note = (
        "Agreement with labels that the judge was not fitted on. A model’s own answers were rated "
        "blind; a judge is fit where its rank correlation with the ratings inside a model and "
        f"condition reaches {rated.FIT_WITHIN}, averaged over all models (the ρ shown) and, where "
        "the run’s own model was rated, over its answers alone. Hand-written answers say nothing "
        "of that. ECE: mean distance of score and rating over bins of equal size."
    )
    return Table(columns, cells, "Judge", note, narrow=True)


def fitness_tables(parts: Iterable[Run], criteria: Collection[str]) -> tuple[Table, ...]:
    """Return how the judges of runs agree with labels, and what they made of nonsense.

    For what is only printed; ``parts`` are of one judge, a run for each trait. Nothing of runs that
    hold neither.
    """
    shown = list(parts)

    def kept(name: str) -> list[Row]:
        files = [each.read(file) for each in shown for file in (name, f"second_{name}")]
        return [row for rows in files for row in rows if row["criterion"] in criteria]

    found = kept("validation")
    return (*([agreement_table(found)] * bool(found)), *canaries_tables(kept("canaries")))


def _parts(rows: Sequence[Row]) -> Iterator[Table]:
    """Return how the judge of each trait does on each model and kind of condition, where rated."""
    for row in rows:
        if row.get("own") and row["criterion"] != COHERENCE:
            yield _parts_table(row)


def _parts_table(found: Row) -> Table:
    answers = found["own"]["compared"]
    parts = {**rated.by_part(answers, rated.model_of), **rated.by_part(answers, rated.kind_of_row)}
    cells = tuple(
        (name, str(each.n), wording.number(each.within, 2), wording.signed(each.bias))
        for name, each in parts.items()
    )
    bins = rated.reliability(answers)
    said = "; ".join(f"{each.score:.0f} with {each.rating:.0f}" for each in bins)
    title = f"{found['judge']} on {found['criterion']}, by model and kind of condition"
    note = (
        "The same agreement on parts of the rated answers, kinds over all models. Score − rating: "
        f"points by which it is too kind. Reliability, mean scores of {len(bins)} parts of equal "
        f"size with the mean ratings there: {said}."
    )
    columns = ("Answers", "n", "ρ within\na condition", "Score −\nrating")
    return Table(columns, cells, title, note, narrow=True)


def _shown(run: Run) -> list[Row]:
    return [*run.read("canaries"), *run.read("second_canaries")]


def canaries_tables(rows: Sequence[Row]) -> tuple[Table, ...]:
    """Return what judges made of nonsense, a line for each criterion; nothing for no rows."""
    if not rows:
        return ()
    names = list(dict.fromkeys(row["name"] for row in rows))
    places = list(dict.fromkeys((_criterion(row), row["judge"]) for row in rows))
    scores = {
        (_criterion(row), row["judge"], row["name"]): wording.number(row["score"]) for row in rows
    }
    cells = tuple(  # a trait without training answers has no canned sentence
        (*place, *(scores.get((*place, name), wording.NONE) for name in names)) for place in places
    )
    note = (
        "What a judge gives to nonsense, and to a sentence of the trait’s training answers that "
        "does not answer the question."
    )
    return (Table(("Criterion", "Judge", *names), cells, "Canaries", note, narrow=True),)


def _labels(conditions: Collection[Condition]) -> dict[Condition, str]:
    """Return what conditions are called: with method and layer where there are several of them."""
    labels = {each: wording.condition_label(each.method, each.coefficient) for each in conditions}
    steered = [each for each in conditions if each.coefficient]
    unnamed = [each for each in steered if each.method not in labels[each]]
    several = len({each.method for each in unnamed}) > 1
    layers = {each.layer for each in steered} - {None}
    for each in unnamed if several else ():
        labels[each] = f"{wording.method_label(each.method)} {labels[each]}"
    for each in steered if len(layers) > 1 else ():
        labels[each] += f", layer {each.layer}"
    return labels


def _corrected(run: Run, validation: list[dict[str, Any]]) -> tuple[Table, ...]:
    """Return the trait's mean by condition, raw and corrected; nothing without rated answers."""
    trait = next((r["criterion"] for r in validation if r["criterion"] != COHERENCE), "")
    errors, finetuned = errors_of(run, trait), bool(run.record["config"].get("adapter"))
    scored = score_answers(run.read("answers"), run.read("verdicts"), trait)
    by_condition = grouped(scored, lambda row: row.condition)
    cells, labels = [], _labels(by_condition)
    for condition, rows in by_condition.items():
        kind = kind_of(condition, finetuned=finetuned)
        by_question = grouped(rows, lambda row: row.answer["question"])
        scores = {at: [row.trait for row in own] for at, own in by_question.items()}
        mean = bootstrap_mean(scores, scale=SCORES)
        right, _ = of_condition(kind, mean, None, errors)
        if right is not None:
            number = sum(map(len, errors.by_kind[kind or ""].values()))
            said = wording.interval(mean), wording.interval(right)
            cells.append((labels[condition], *said, str(number)))
    return means_table(("Condition", "Raw", "Corrected [95%]", "Rated"), cells, errors)
