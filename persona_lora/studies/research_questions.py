"""The five research questions, answered on one Markdown page from what runs left on disk.

What is said is decided by intervals and corrected p values; ``research_questions.md.j2`` says it.
Where a run is missing, the page says so, and names the command that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from persona_lora.core.errors import UserError
from persona_lora.core.files import write_text
from persona_lora.core.runs import Run
from persona_lora.report.comparisons import ConditionFit, measure_tables
from persona_lora.report.correction_tables import corrected_finetunes
from persona_lora.report.figures import Picture
from persona_lora.report.resampling import holm
from persona_lora.report.scores import grouped, marked, unfit_mark
from persona_lora.report.sections import Table, fill_template
from persona_lora.report.trust import standing
from persona_lora.report.wording import (
    CLEAR,
    NONE,
    UNDECIDED,
    between,
    clear_sign,
    interval,
    number,
    p_equals,
    p_value,
    time_or_memory,
    title_of,
    unclear,
)
from persona_lora.studies.drift.figure import render_prediction, render_prevention
from persona_lora.studies.drift.read import prevention_scores
from persona_lora.studies.drift.read_prediction import (
    POOLED,
    TEXT,
    WEIGHTS,
    Contrast,
    Prediction,
    contrasts,
    nulls,
    predict,
    prediction_lines,
    rows_of,
    seeds_of,
    unfit_marks,
)
from persona_lora.studies.personas.figure import name_of
from persona_lora.studies.personas.figure import render_comparison as render_personas
from persona_lora.studies.personas.read_fits import (
    agreement_line,
    condition_fits,
    order_line,
    over_personas,
    seeds_line,
)
from persona_lora.studies.read_seeds import effects_over, over_seeds, seeds_lines
from persona_lora.studies.steering.figure import (
    SPLITS,
    render_effects,
    render_latency,
)
from persona_lora.studies.steering.read import (
    comparison_judges,
    comparison_lines,
    speed_beside_base,
)
from persona_lora.studies.steering.read_comparison import (
    ACTIVATION,
    BASE,
    FIRST_TOKEN,
    LORA,
    MERGED,
    RANDOM,
    RANDOM_LORA,
    TOKENS,
    Comparison,
    MethodEffect,
    Pooled,
    Timing,
    pooled,
    ratios,
    read_comparison,
)
from persona_lora.studies.steering.read_spaces import (
    lines_of,
    plain_table,
    read_spaces,
    shape_line,
    spaces_picture,
    spread,
    traits_table,
    words_table,
)

EXPECTED_R = 0.7
BASE_MODEL = "base"  # stands among the prevented ones for comparison
Row = Mapping[str, Any]
Part = dict[str, Any]
Place = tuple[str, str]  # a set of questions, a method
STEERED = (LORA, ACTIVATION)  # the methods of which the page asks whether they move a trait at all


def write_research_questions(results: Path, page: Path) -> list[str]:
    """Write the page and its pictures; return the parts that were not measured yet.

    ``results`` holds ``compare/<trait>`` (or its seeds below), ``latency`` and ``spaces`` anywhere,
    ``prediction``, ``prevention/<trait>`` and ``personas/comparison``. Raises UserError if none is
    there.
    """
    parts: dict[str, Any] = {
        "behaviour": _behaviour(results / "compare", page),
        "prediction": _prediction(Run(results / "prediction"), page),
        "prevention": _prevention(results / "prevention", page),
        "latency": _latency(results, page),
        "personas": _personas(Run(results / "personas" / "comparison"), page),
        "sums": _sums(results),
        "spaces": _spaces(results, page),
    }
    if not any(parts.values()):
        raise UserError(f"{results} holds no run behind the questions; run scripts/reproduce.sh")
    filled = fill_template("research_questions.md.j2", **parts, absent="Not measured yet.")
    write_text(page, filled)
    return [name for name, found in parts.items() if not found]


# -- 1. the same traits? --------------------------------------------------------------------


def _behaviour(folder: Path, page: Path) -> Part | None:
    by_name = {at.name: each for at in sorted(folder.glob("*")) if (each := _runs_in(at))}
    if not by_name:
        return None
    compared = list(by_name.values())
    rows, lines, at_level, winners, undecided = [], [], [], [], 0
    moved = dict.fromkeys(STEERED, 0)
    effects = _tested({title_of(name): effects_over(runs) for name, runs in by_name.items()})
    once = []  # of each trait, what is called after it alone: sycophancy, not sycophancy_layer28
    for name, runs in by_name.items():
        found = [read_comparison(run) for run in runs]
        once += [runs] * (name == found[0].trait)
        trait = title_of(name)
        own = effects[trait]
        at_level += [p.matched for each in found for p in each.points if p.matched is not None]
        lines.append((trait, " ".join(_said(runs, found))))
        for split in dict.fromkeys(split for split, _ in own):
            for method in moved:
                one = own[split, method]
                moved[method] += clear_sign(one.effect, one.effect_p) > 0
            activation = own[split, ACTIVATION]
            winners.append(clear_sign(activation.difference, activation.p_holm))
            undecided += unclear(activation.difference, activation.p_holm) == UNDECIDED
            mark = unfit_mark(activation.judge)
            rows.append((trait + mark, SPLITS[split], *_effects(split, own)))
    n, seeds = len(winners), [len(runs) for runs in compared]
    return {
        "answer": "Yes." if moved[LORA] == moved[ACTIVATION] == n else "Not in every case.",
        "n": n,
        "untested": _untested(effects),
        "by_weights": moved[LORA],
        "by_activations": moved[ACTIVATION],
        "weights_further": winners.count(1),
        "activations_further": winners.count(-1),
        "undecided": undecided,
        "equal": winners.count(0) - undecided,
        "beyond_random": sum(
            clear_sign(each.difference, each.p_holm) > 0
            for own in effects.values()
            for (_, method), each in own.items()
            if method == RANDOM_LORA
        ),
        "levels": len(at_level),
        "unmatched": at_level.count(False),
        "seeds": " to ".join(map(str, sorted({min(seeds), max(seeds)}))),
        "rows": _table(
            "trait | questions | weights | activations | random differences (strongest) | "
            "random vectors (strongest) | weights − activations | weights − random differences",
            rows,
        ),
        "traits": len(once),
        "pooled": _table(
            "questions | what | weights − activations | p | ",
            map(_pooled_row, pooled(once) if once[1:] else ()),
        ),
        "lines": lines,
        "picture": _shown(
            page, "same_traits", render_effects(effects), "What each way of steering moved"
        ),
    }


def _tested(
    effects: Mapping[str, Mapping[Place, MethodEffect]],
) -> dict[str, dict[Place, MethodEffect]]:
    """Return the effects, the tests of weights and of vectors corrected over all of them."""
    found = {trait: dict(own) for trait, own in effects.items()}
    tested = [(trait, at) for trait, own in found.items() for at in own if at[1] in STEERED]
    adjusted = holm([found[trait][at].effect_p for trait, at in tested])
    for (trait, at), p in zip(tested, adjusted, strict=True):
        found[trait][at] = replace(found[trait][at], effect_p=p)
    return found


def _untested(effects: Mapping[str, Mapping[Place, MethodEffect]]) -> int:
    """Return how many effects of weights and of vectors have no test, as over two seeds."""
    steered = [e for own in effects.values() for at, e in own.items() if at[1] in STEERED]
    return sum(each.effect_p is None for each in steered)


def _runs_in(folder: Path) -> list[Run]:
    """Return the comparison in a folder, or those of its training seeds."""
    files = [*folder.glob("splits.jsonl"), *folder.glob("seed*/splits.jsonl")]
    return [Run(file.parent) for file in sorted(files)]


def _said(runs: Sequence[Run], found: Sequence[Comparison]) -> Sequence[str]:
    """Say on what a trait's comparison rests, what it found, and what both judges make of it."""
    if len(runs) > 1:
        return seeds_lines(runs, over_seeds(runs))
    both = comparison_judges(runs[0], found[0])
    return (standing(runs[0]), *comparison_lines(runs[0], found[0], both)[:1])


def _effects(split: str, own: Mapping[Place, MethodEffect]) -> Iterable[str]:
    for method in (LORA, ACTIVATION, RANDOM_LORA, RANDOM):
        each = own[split, method]
        most = "" if each.most is None else f" ({number(each.most)})"
        test = f", p {p_value(each.effect_p)}" if method in STEERED else ""
        yield interval(each.effect) + most + test
    for method in (ACTIVATION, RANDOM_LORA):
        each = own[split, method]
        yield f"{interval(each.difference)}, p {p_value(each.p_holm)}"


def _pooled_row(each: Pooled) -> tuple[str, ...]:
    told = {1: "more with weights", -1: "more with activations"}
    return (
        SPLITS[each.split], each.what, interval(each.difference), p_value(each.p_holm),
        unclear(each.difference, each.p_holm)
        or told[clear_sign(each.difference, each.p_holm)],
    )  # fmt: skip


# -- 2. prediction and prevention -----------------------------------------------------------


def _prediction(run: Run, page: Path) -> Part | None:
    judged, predictors = rows_of(run)
    if not judged or not predictors:
        return None
    found = predict(judged, predictors)
    pooled = {each.kind: each for each in found if each.judged == POOLED}
    best, text = pooled[WEIGHTS], pooled.get(TEXT)
    kinds = [
        (each.kind, each.said, number(each.rho, 2), p_value(each.p_holm),
         f"{number(each.error, 2)} / {number(each.plain_error, 2)}",
         f"{number(each.data_error, 2)} / {number(each.plain_data_error, 2)}")
        for each in pooled.values()
    ]  # fmt: skip
    gaps = {(each.first, each.second): each for each in contrasts(judged, predictors)}
    lines = list(prediction_lines(run))
    return {
        "answer": _predicts(best),
        "standing": standing(run, seeds_of(run)),
        "n": best.n,
        "data_sets": best.data_sets,
        "control_rows": run.record["config"].get("control_rows"),
        "r": best.said,
        "p": p_equals(best.p_holm),
        "expected": EXPECTED_R,
        "error": number(best.data_error, 2),
        "plain_error": number(best.plain_data_error, 2),
        "text": text and _beside_text(best, text, gaps[WEIGHTS, TEXT]),
        "kinds": _table(
            "predictor | pooled r [95%] | ρ | p | error, finetune left out / of the mean | "
            "error, data set left out / of the mean",
            kinds,
        ),
        "contrasts": "; ".join(
            f"{each.first} − {each.second} {between(each.difference, each.low, each.high, 2)}"
            for each in gaps.values()
            if WEIGHTS in (each.first, each.second)
        ),
        "by_trait": _by_trait(found, (judged, predictors), unfit_marks(run)),
        "judges": [line for line in lines if "judge" in line],
        "picture": _shown(
            page,
            "prediction",
            render_prediction(judged, predictors),
            "Predicted against judged drift",
        ),
    }


def _beside_text(best: Prediction, text: Prediction, gap: Contrast) -> str:
    """Say how weights stand beside the mean score of what was trained on."""
    told = "no better than" if gap.low <= 0 <= gap.high else "better than"
    told = "worse than" if gap.high < 0 else told
    return (
        f"{told} the mean score of the training text (r {text.said}; weights minus text "
        f"{between(gap.difference, gap.low, gap.high, 2)}, the interval of one comparison)"
    )


def _predicts(best: Prediction) -> str:
    if best.r_low <= 0 or best.p_holm is None or best.p_holm >= CLEAR:
        return "Not shown here."
    if best.r_low > EXPECTED_R:
        return "Yes."
    return "Yes; how closely is less certain." if best.r > EXPECTED_R else "In part."


def _by_trait(
    found: Sequence[Prediction],
    rows_read: tuple[Sequence[Row], Sequence[Row]],
    marks: Mapping[str, str],
) -> str:
    chance = {each.judged: each for each in nulls(*rows_read)}
    in_weights = [each for each in found if each.kind == WEIGHTS and each.judged != POOLED]
    rows = []
    for own in (each for each in in_weights if each.own):
        others = [each for each in in_weights if each.judged == own.judged and not each.own]
        best = max(others, key=lambda each: abs(each.r), default=None)
        null = chance.get(own.judged)
        told = (NONE, NONE) if null is None else (number(null.high, 2), p_value(null.p))
        other = NONE if best is None else f"{best.direction}: {best.said}"
        rows.append((title_of(own.judged) + marks.get(own.judged, ""), own.said, other, *told))
    return _table(
        "judged trait | r of its own direction | best other direction | "
        "95% of random ones are below | share of random as far",
        rows,
    )


def _prevention(folder: Path, page: Path) -> list[Part]:
    parts = []
    for run in (Run(file.parent) for file in sorted(folder.glob("*/measures.jsonl"))):
        trait, rows = run.record["config"]["trait"], run.read("measures")
        models = list(dict.fromkeys(row["condition"] for row in rows))
        scores = prevention_scores(run, rows, models[0])
        mark = unfit_mark(marked(*(each.judge for each in scores if each.task == "trait")))
        lower = [
            each.condition
            for each in scores
            if each.task == "trait"
            and each.condition != BASE_MODEL
            and clear_sign(each.difference, each.p_holm) < 0
        ]
        tables = measure_tables(scores)
        told = [f"{each.title.capitalize()}:\n\n" if each.title else "" for each in tables]
        picture = render_prevention(scores, trait)
        parts.append(
            {
                "trait": title_of(trait) + mark,
                "lower": ", ".join(lower) or "none",
                "standing": standing(run, run.record["config"].get("finetunes", 1)),
                "rows": "\n\n".join(
                    f"{title}{each.markdown()}" for title, each in zip(told, tables, strict=True)
                ),
                "corrected": corrected_finetunes(trait, _answers_of(run, rows), BASE_MODEL),
                "picture": _shown(
                    page, f"prevention_{trait}", picture, "What prevention buys and costs"
                ),
            }
        )
    return parts


def _answers_of(run: Run, rows: Sequence[Row]) -> dict[str, list[Run]]:
    places = dict.fromkeys((row["condition"], row.get("seed", "")) for row in rows)
    return {
        name: [Run(run.folder / "answers" / f"{name} {seed}".strip()) for _, seed in own]
        for name, own in grouped(places, lambda place: place[0]).items()
    }


# -- 3. faster? -----------------------------------------------------------------------------


def _latency(folder: Path, page: Path) -> Part | None:
    files = sorted(folder.rglob("latency/timings.jsonl"))
    if not files:
        return None
    run = Run(files[0].parent)
    timings = [Timing(**row) for row in run.read("timings")]
    found = ratios(timings)
    said = {
        (each.variant, each.batch, each.measure): interval(each.ratio, 2)
        for each in found
        if each.variant != BASE
    }
    batches = sorted({each.batch for each in found})
    variants = list(dict.fromkeys(name for name, *_ in said))
    rows = (
        (name, str(batch), said[name, batch, FIRST_TOKEN], said[name, batch, TOKENS])
        for name, batch in product(variants, batches)
    )
    merged = [each.ratio for each in found if (each.variant, each.measure) == (MERGED, TOKENS)]
    times = (time_or_memory(**row) for row in run.read("times"))
    speed, largest = speed_beside_base(merged), batches[-1]
    return {
        "answer": f"The model with merged weights {speed}, over all batch sizes.",
        "batch": largest,
        "said": ", ".join(f"{name} {said[name, largest, TOKENS]}" for name in variants),
        "rows": _table("variant | batch | time to the first token | time for a token", rows),
        "times": _table("what | time or memory", times),
        "rounds": len({each.round for each in timings}),
        "picture": _shown(page, "latency", render_latency(found), "Time over the base model's"),
    }


# -- 4. combined? ---------------------------------------------------------------------------


def _personas(run: Run, page: Path) -> Part | None:
    rows = run.read("held_out")
    found = condition_fits(rows, over=over_personas) if rows else ()
    fits = {each.condition: each for each in found}
    lora = fits.get("lora")
    if lora is None or lora.difference is None:
        return None
    worth = standing(run), seeds_line(rows), order_line(found), agreement_line(rows)
    return {
        "answer": "Yes." if clear_sign(lora.difference, lora.p_holm) > 0 else "Not shown here.",
        "beyond": _beyond_chance(rows) if "random" in fits else None,
        "worth": " ".join(worth),
        "gain": interval(lora.difference, 2),
        "p": p_equals(lora.p_holm),
        "n": lora.fit.n_questions,
        "relevance": interval(lora.relevance),
        "plain_relevance": interval(fits["none"].relevance),
        "rows": _table(
            "method | fit [95%] | gain over unsteered | p | coherence | relevance",
            map(_fit_row, fits.values()),
        ),
        "picture": _shown(
            page, "personas", render_personas(run), "Ways of giving a person's voice"
        ),
    }


def _beyond_chance(rows: Sequence[Row]) -> str:
    """Return what CMA-ES gains over random search, as the table against it has it."""
    against = condition_fits(rows, reference="random", over=over_personas)
    (lora,) = (each for each in against if each.condition == "lora")
    gain = "not known" if lora.difference is None else interval(lora.difference, 2)
    return f"{gain} (p {p_equals(lora.p_holm)})"


def _fit_row(each: ConditionFit) -> tuple[str, ...]:
    return (
        name_of(each.condition), interval(each.fit, 2),
        interval(each.difference, 2), p_value(each.p_holm),
        number(each.coherence.mean), number(each.relevance.mean),
    )  # fmt: skip


def _sums(folder: Path) -> Part | None:
    run = _spaces_run(folder)
    if run is None:
        return None
    lines = [row for row in run.read("linearity") if row["trait"] != row["other"]]
    moves = [row for row in run.read("interference") if row["steered"] != row["read"]]
    rows = []
    for method in ("weights", "activations"):
        apart = [row["residual"] for row in lines if row["method"] == method]
        along = [abs(row["value"]) for row in moves if row["method"] == method]
        rows.append((method, spread(apart), str(len(apart)), spread(along), str(len(along))))
    columns = "steered by | distance from the sum | pairs | moved along another trait | pairs"
    return {"rows": _table(columns, rows)}


# -- 5. more interpretable? -----------------------------------------------------------------


def _spaces(folder: Path, page: Path) -> Part | None:
    run = _spaces_run(folder)
    if run is None:
        return None
    found = read_spaces(run)
    simpler = "Not simpler; but" if 2 * found.recognised > found.n else "Not simpler, and only"
    told = f"what {found.recognised} of {found.n} differences do"
    return {
        "answer": f"{simpler} {told} is nearest to the vector of its trait.",
        "lines": lines_of(found),
        "rank": shape_line(found, lambda each: spread([r for x in each for r in x.ranks], 1)),
        "layers": shape_line(found, lambda each: spread([x.layers for x in each], 1)),
        "full_rank": max(row["rank"] for row in run.read("spectra")),
        "rows": traits_table(found).markdown(),
        "plain": plain_table(found),
        "words": words_table(found) if found.words else None,
        "picture": _shown(page, "spaces", spaces_picture(run), "Weight space and activation space"),
    }


def _spaces_run(folder: Path) -> Run | None:
    files = sorted(folder.rglob("spaces/linearity.jsonl"))
    return Run(files[0].parent) if files else None


# -- shared ---------------------------------------------------------------------------------


def _shown(page: Path, name: str, picture: Picture, caption: str) -> str:
    """Write ``figures/<name>.png`` beside the page; return the Markdown that shows it."""
    picture.save(page.parent / "figures" / f"{name}.png")
    return f"![{caption}](figures/{name}.png)"


def _table(columns: str, rows: Iterable[Sequence[str]]) -> str:
    return Table.of(columns, rows).markdown()
