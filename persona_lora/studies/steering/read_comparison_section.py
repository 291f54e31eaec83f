"""The section of a report on weights and activations at equal divergence."""

from __future__ import annotations

from dataclasses import dataclass

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.resampling import Interval
from persona_lora.report.sections import Content, ReportOptions, data_uri
from persona_lora.studies.steering.figure import NAMES, SPLITS, render_comparison
from persona_lora.studies.steering.read_comparison import (
    ACTIVATION,
    Comparison,
    Overall,
    Point,
    read_comparison,
)

EXAMPLES = 4
PLACES = {
    "eval": "On held-out questions",
    "ood": "Out of distribution",
    "extract": "On the extraction set",
}


@dataclass(frozen=True)
class ComparisonBody:
    """The answer in lines, the picture, both tables, and answers side by side."""

    verdicts: tuple[str, ...]
    plot: str
    overall: tuple[tuple[str, ...], ...]
    points: tuple[tuple[str, ...], ...]
    statistic: str
    examples: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


def comparison_section(run: Run, options: ReportOptions) -> Content:
    """Return the section of one comparison."""
    found = read_comparison(run)
    body = ComparisonBody(
        verdict_lines(found),
        data_uri(render_comparison(found)),
        tuple(_overall_row(each) for each in found.overall),
        tuple(_point_row(each) for each in found.points),
        "mean" if found.statistic == "mean" else "95th percentile",
        _examples(run, found),
    )
    title = f"{wording.title_of(found.trait)}: weights or activations?"
    return Content("report_comparison.html.j2", title, " ".join(body.verdicts[:1]), body)


def verdict_lines(comparison: Comparison) -> tuple[str, ...]:
    """Return the answer in a line a split, and a line on the controls."""
    lines = []
    for split in dict.fromkeys(each.split for each in comparison.overall):
        own = {each.method: each for each in comparison.overall if each.split == split}
        lines.append(_verdict(own["lora"], own[ACTIVATION], split))
    controls = [each for each in comparison.overall if each.method.startswith("random")]
    said = "; ".join(
        f"{NAMES[each.method]}, {SPLITS[each.split]}: {wording.interval(each.effect)}"
        for each in controls
    )
    return (*lines, f"Random controls at the same divergence moved it by: {said}.")


def _verdict(lora: Overall, activation: Overall, split: str) -> str:
    gap = activation.difference
    where = PLACES[split]
    if gap is None or gap.mean is None:
        return f"{where} nothing could be paired."
    p = activation.p_holm
    clear = _excludes_zero(gap) and p is not None and p < wording.CLEAR
    winner = "weights" if gap.mean > 0 else "activations"
    said = (
        f"{winner} steered further" if clear else "neither steered clearly further than the other"
    )
    lost = (
        ""
        if activation.coherence is None
        else (f"; coherence with weights is {wording.interval(activation.coherence)} higher")
    )
    return (
        f"{where}, at equal divergence, {said}: weights moved the trait by "
        f"{wording.interval(lora.effect)} points, activations by "
        f"{wording.interval(activation.effect)}, a paired difference of {wording.interval(gap)} "
        f"(p {wording.p_value(activation.p_holm)}, Holm){lost}."
    )


def _excludes_zero(interval: Interval) -> bool:
    known = interval.low is not None and interval.high is not None
    return known and not (interval.low or 0.0) <= 0 <= (interval.high or 0.0)


def _overall_row(each: Overall) -> tuple[str, ...]:
    return (
        SPLITS[each.split],
        NAMES[each.method],
        wording.interval(each.effect),
        str(each.effect.n_questions),
        wording.NONE if each.difference is None else wording.interval(each.difference),
        wording.p_value(each.p_holm),
        wording.NONE if each.coherence is None else wording.interval(each.coherence),
    )


def _point_row(each: Point) -> tuple[str, ...]:
    kl = wording.NONE if each.kl_mean is None else wording.number(each.kl_mean, 3)
    p95 = wording.NONE if each.kl_p95 is None else wording.number(each.kl_p95, 2)
    return (
        SPLITS[each.split],
        NAMES[each.method],
        wording.NONE if each.coefficient is None else wording.number(each.coefficient, 2),
        kl if each.matched is not False else f"{kl} (not matched)",
        p95,
        wording.interval(each.trait),
        str(each.trait.n),
        f"{100 * each.trait.coverage:.0f}%",
        wording.interval(each.coherence),
        wording.NONE if each.difference is None else wording.interval(each.difference),
        wording.p_value(each.p_holm),
    )


def _examples(
    run: Run, comparison: Comparison
) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return the first questions with the answers of every method at the highest level."""
    highest = max(each.level for each in comparison.points if each.level is not None)
    wanted: dict[tuple[str, float | None], str] = {
        (name, None): NAMES[name] for name in ("none", "prompt_pos")
    }
    for each in comparison.points:
        if each.level == highest:
            wanted[each.method, each.coefficient] = NAMES[each.method]
    answers = Run(run.folder / comparison.points[0].split).read("answers")
    by_question: dict[str, dict[str, str]] = {}
    for row in answers:
        name = wanted.get((row["method"], row["coefficient"]))
        if name is not None:
            by_question.setdefault(row["question"], {})[name] = row["answer"]
    return tuple(
        (question, tuple(found.items())) for question, found in list(by_question.items())[:EXAMPLES]
    )
