"""Numbers and findings in words: the same wording in plots, reports and on the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from persona_lora.core.chat import Place
from persona_lora.report.conditions import ConditionSummary, ControlSummary
from persona_lora.report.curve import PairedDifference
from persona_lora.report.resampling import ALIKE, EQUAL, SCORES, Bounds, Estimate, Interval
from persona_lora.report.scores import CONTROL, NEUTRAL, UNSTEERED, marked, method_of
from persona_lora.report.summary import SweepSummary

PROMPT_LABELS = {
    "prompt_pos": "positive prompt",
    "prompt_neg": "negative prompt",
    "prompt_neutral": "neutral prompt",
}
CLEAR = 0.05  # a difference is called clear below this (corrected) p value
MARGIN = 0.05  # of a scale, or of the time of the base: what is surely nearer is called equal
UNDECIDED = "undecided"
FEWEST_EQUAL = 12  # of fewer questions intervals of skewed differences cover too little for that
NONE = "–"
_MINUS = "\N{MINUS SIGN}"
_NO_WIDTH = {EQUAL: "all equal", ALIKE: "resamples alike"}


def number(value: float | None, digits: int = 0) -> str:
    """Return a rounded number with a true minus sign, or a dash for None and NaN."""
    if value is None or math.isnan(value):
        return NONE
    # Rounding first, and adding 0.0, keeps "−0" from being printed.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", _MINUS)


def signed(value: float, digits: int = 0) -> str:
    """Return a rounded number with its sign, "+" or a true minus, and none for 0."""
    said = number(value, digits)
    return f"+{said}" if float(said.replace(_MINUS, "-")) > 0 else said


def percent(share: float | None) -> str:
    """Return a share as a whole percentage."""
    return "–" if share is None else f"{100 * share:.0f}%"


def significant(value: float | None) -> str:
    """Return a small positive number with two significant digits, or a dash for None."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    return f"{value:#.2g}".rstrip(".").replace("-", _MINUS)


def coefficient(value: float | None) -> str:
    """Return a coefficient with its sign, to four digits: "+1.5", "0", "−2"."""
    if value is None:
        return NONE
    return (f"{value:+.4g}" if value else "0").replace("-", _MINUS)


def interval(value: Interval | Estimate | None, digits: int = 0) -> str:
    """Return "71 [64, 77]", without brackets where there is no interval; a dash for None.

    What has no interval because it would have no width is told from one value: "0 [not known: all
    equal]", "1.00 [not known: resamples alike]".
    """
    if value is None:
        return NONE
    centre = value.mean if isinstance(value, Interval) else value.value
    if value.reason in _NO_WIDTH:
        return f"{number(centre, digits)} [not known: {_NO_WIDTH[value.reason]}]"
    return between(centre, value.low, value.high, digits)


def between(centre: float | None, low: float | None, high: float | None, digits: int = 0) -> str:
    """Return a number with the ends of its interval: "71 [64, 77]", or alone where it has none."""
    if low is None or high is None:
        return number(centre, digits)
    return f"{number(centre, digits)} [{number(low, digits)}, {number(high, digits)}]"


def explained(value: Estimate, digits: int = 2) -> str:
    """Return an estimate with its interval, or with why it has none: "0.50 (one question …)"."""
    said = between(value.value, value.low, value.high, digits)
    return said if value.reason is None else f"{said} ({value.reason})"


def gap(difference: Interval | None, p: float | None, digits: int = 0) -> tuple[str, str, str]:
    """Return the cells of a paired difference, its pairs and its p, empty for the reference."""
    if difference is None:
        return "", "", ""
    return interval(difference, digits), str(difference.n_questions), p_value(p)


def pairs(difference: Interval | None, questions: int) -> str:
    """Return " (19 of 20)" where fewer questions than stand beside are behind a difference."""
    if difference is None or difference.n_questions == questions:
        return ""
    return f" ({difference.n_questions} of {questions})"


def scored(value: Interval) -> tuple[str, str, str, str]:
    """Return the cells of a score: mean, interval, questions, and how many answers were scored."""
    share = f"{value.n}/{round(value.n / value.coverage)}" if value.coverage else "0"
    return number(value.mean, 1), span(value.low, value.high), str(value.n_questions), share


def span(low: float | None, high: float | None, digits: int = 1) -> str:
    """Return "64.0 … 77.0"; a dash where there is none."""
    return (
        "–" if low is None and high is None else f"{number(low, digits)} … {number(high, digits)}"
    )


def change(value: Interval | None) -> str:
    """Return a difference with the sign of its mean: "+22 [12, 33]"; a dash for None."""
    sign = "+" if value is not None and value.mean is not None and round(value.mean) > 0 else ""
    return sign + interval(value)


def clear_sign(gap: Interval | None, p: float | None) -> int:
    """Return the sign of a difference whose (corrected) test excludes 0, else 0.

    The interval beside it is for one comparison, and decides nothing.
    """
    if gap is None or not gap.mean or p is None or p >= CLEAR:
        return 0
    return 1 if gap.mean > 0 else -1


def direction_of(difference: PairedDifference) -> int:
    """Return 1 or −1 where a paired difference is clear of 0, and 0 where it is not."""
    return clear_sign(difference.interval, _decisive(difference))


def _decisive(difference: PairedDifference) -> float | None:
    return difference.p if difference.p_holm is None else difference.p_holm


def unclear(
    gap: Interval | None, p: float | None, *, before: str = "", scale: Bounds = SCORES
) -> str:
    """Say, after ``before``, what is known of a difference not clear of 0; "" of one that is.

    "equal within 5 points" where its whole 95% interval, over ``FEWEST_EQUAL`` questions or more,
    lies within ``MARGIN`` of the values' scale: two one-sided tests at 2.5% each (Schuirmann 1987).
    Else ``UNDECIDED``: no difference is shown, and none of that size is excluded.
    """
    if clear_sign(gap, p):
        return ""
    margin = MARGIN * (scale.high - scale.low)
    if gap is None or gap.low is None or gap.high is None or gap.n_questions < FEWEST_EQUAL:
        return f"{before}{UNDECIDED}"
    equal = max(-gap.low, gap.high) <= margin
    return f"{before}equal within {margin:g} points" if equal else f"{before}{UNDECIDED}"


def unclear_of(difference: PairedDifference, before: str = "") -> str:
    """Say the same of a paired difference, by the test that decides on it."""
    return unclear(difference.interval, _decisive(difference), before=before)


def time_or_memory(what: str, unit: str, value: float) -> tuple[str, str]:
    """Return a name and an amount: a swap's time, or the memory that a way of steering keeps."""
    if unit != "bytes":
        return what, f"{number(1000 * value)} ms"
    size = f"{number(value / 2**20)} MiB" if value >= 2**20 else f"{number(value / 2**10, 1)} KiB"
    return f"kept beside the model, {what}", size


def p_value(p: float | None) -> str:
    """Return a p value to three digits, "< 0.001" below."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float | None) -> str:
    """Return a p value with its relation: "= 0.040", "< 0.001"."""
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def title_of(trait: str) -> str:
    """Return a trait's name as a title."""
    words = trait.replace("_", " ")
    return words[:1].upper() + words[1:]


def token(text: str) -> str:
    """Return a token's text as it can be printed: "␣the" for what begins with a space."""
    shown = text.replace(" ", "␣").replace("\n", "⏎")
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in shown)


def label(condition: ConditionSummary) -> str:
    """Return what a condition is called in a table: "+1.5", or "+0.1 nat (+1.5)" if so asked."""
    said = condition_label(condition.method, condition.coefficient)
    return said if condition.nats is None else f"{coefficient(condition.nats)} nat ({said})"


def condition_label(method: str, value: float | None) -> str:
    """Return "+1.5", "random +1.5" or "random 2 +1.5" for a control, or a reference's name."""
    if value is None:
        return method_label(method)
    own = f"{method.replace('#', ' ')} " if method_of(method) == CONTROL else ""
    return f"{own}{coefficient(value)}"


def method_label(method: str) -> str:
    """Return what a method without a coefficient is called."""
    return PROMPT_LABELS.get(method, method.replace("_", " "))


def headline(summary: SweepSummary) -> str:
    """Return the finding in a few sentences, with intervals and without overstatement."""
    if summary.method == UNSTEERED:
        sentences = [_unsteered(summary), _prompts(summary)]
    else:
        found = [_change(summary), _control(summary)]
        if summary.control is not None and direction_of(summary.control.overall) < 1:
            found.reverse()  # what random directions do as well is said first
        sentences = [*found, coherent_line(summary), _prompts(summary)]
    return " ".join(sentence for sentence in sentences if sentence)


def sweep_title(summary: SweepSummary) -> str:
    """Return the title of a sweep's picture."""
    name = title_of(summary.trait)
    if summary.method == UNSTEERED:
        return f"{name}: the model unsteered and prompted"
    return f"{name} against the coefficient"


def layers(place: Place) -> str:
    """Return "layer 19", or "layers 10+14+18" of several at once."""
    return f"layer{'s' * isinstance(place, str)} {place}"


def at_layer(summary: SweepSummary) -> str:
    """Return ", layer 19" where a vector steers, to stand behind a trait's name."""
    return "" if summary.layer is None else f", {layers(summary.layer)}"


def statistics_line(summary: SweepSummary) -> str:
    """Return rank correlation, slope and R² with their intervals, on one line."""
    if summary.method == UNSTEERED:
        return "nothing was steered, so there is no curve"
    rho, fit, span = summary.rho_means, summary.fit, summary.coherent_range
    parts = [_missing("ρ", rho) if rho.value is None else f"Spearman's ρ {explained(rho)}"]
    if fit.slope.value is None:
        parts.append(_missing("slope", fit.slope))
    else:
        asked = _questions(summary)
        lost = (
            ""
            if fit.slope.n_questions == asked
            else f", {fit.slope.n_questions} of {asked} questions"
        )
        parts.append(f"slope {interval(fit.slope, 1)} per unit (p {p_equals(fit.p)}{lost})")
        parts.append(f"R² {number(fit.r_squared, 2)}")
        parts.append(f"fitted over {coefficient(span.low)} … {coefficient(span.high)}")
    return "  ·  ".join(parts)


def place_line(summary: SweepSummary) -> str:
    """Return where a vector steers, and how it compares with its control; "" for a diff."""
    place = "" if summary.layer is None else f"{summary.method} at {layers(summary.layer)}"
    return "  ·  ".join(part for part in (place, control_line(summary)) if part)


def control_line(summary: SweepSummary) -> str:
    """Return how the vector compares with the random direction, on one line; "" without one."""
    if summary.control is None:
        return ""
    overall, rho = summary.control.overall, summary.control.rho_means
    if overall.interval.mean is None:
        return f"{controls_name(summary.control)}: no comparison ({overall.interval.reason})"
    return (
        f"{controls_name(summary.control)} ρ {interval(rho, 2)}  ·  "
        f"beyond it {change(overall.interval)}, p {p_equals(overall.p)}"
    )


def controls_name(control: ControlSummary) -> str:
    """Return "random direction", or "mean of 3 random directions"."""
    several = control.draws > 1
    return f"mean of {control.draws} random directions" if several else "random direction"


def questions_line(summary: SweepSummary) -> str:
    """Return "20 questions"."""
    questions = _questions(summary)
    return "1 question" if questions == 1 else f"{questions} questions"


def sample_line(summary: SweepSummary) -> str:
    """Return how many questions and answers stand behind the numbers, and who judged them."""
    judged = judges_line(summary.trait_judge, summary.coherence_judge)
    return (
        f"{questions_line(summary)}, {answers_line(all_conditions(summary))}; judge: {judged}; "
        f"{_intervals(summary)}"
    )


def all_conditions(summary: SweepSummary) -> list[ConditionSummary]:
    """Return the conditions and those of the control, the unsteered model once."""
    control = () if summary.control is None else summary.control.conditions
    return [*summary.conditions, *(each for each in control if each.coefficient)]


def answers_line(conditions: Iterable[ConditionSummary]) -> str:
    """Return "180 answers, 98% scored"."""
    conditions = list(conditions)
    rows = sum(each.rows for each in conditions)
    scored = sum(each.trait.n for each in conditions)
    return f"{rows} answers, {number(100 * scored / rows if rows else None)}% scored"


def judges_line(*judges: str) -> str:
    """Return the names of judges, each once."""
    return marked(*judges) or "none"


def judged_by(*judges: str) -> str:
    """Return " Judge: reader (unfit for evil)." for a note; "" where nothing says who judged."""
    said = marked(*judges)
    return f" Judge: {said}." if said else ""


def gaps(summary: SweepSummary) -> list[str]:
    """Return what could not be computed for a condition, and why, one sentence each."""
    return [
        sentence for each in all_conditions(summary) for sentence in _gaps_of(summary.trait, each)
    ]


def _gaps_of(trait: str, each: ConditionSummary) -> list[str]:
    from_zero = None if each.from_zero is None else each.from_zero.interval
    values = ((title_of(trait), each.trait), ("Coherence", each.coherence))
    return [
        f"{name} at {label(each)}: {value.reason}."
        for name, value in (*values, ("Change from 0", from_zero))
        if value is not None and value.reason is not None
    ]


def _questions(summary: SweepSummary) -> int:
    return max((each.questions for each in summary.conditions), default=0)


def _intervals(summary: SweepSummary) -> str:
    if _questions(summary) < 2:
        return "no intervals from one question"
    return f"intervals: {number(100 * summary.confidence)}% bootstrap over questions"


def _missing(name: str, estimate: Estimate) -> str:
    return f"no {name} ({estimate.reason})"


def _ends(summary: SweepSummary) -> tuple[ConditionSummary, ConditionSummary] | None:
    """Return the first and last scored conditions of the coherent range, or of the whole sweep."""
    scored = [each for each in summary.steered if each.trait.mean is not None]
    inside = [each for each in scored if each.coefficient in summary.coherent_range.coefficients]
    chosen = inside if len(inside) > 1 else scored
    return (chosen[0], chosen[-1]) if len(chosen) > 1 else None


def _change(summary: SweepSummary) -> str:
    ends, name = _ends(summary), title_of(summary.trait)
    if ends is None:
        return f"{name} was scored at fewer than two coefficients, so no change can be shown."
    low, high = ends
    place = None if summary.layer is None else layers(summary.layer)
    subject = name if place is None else f"Steered at {place}, {summary.trait}"
    return (
        f"{subject} {_verb(summary, low, high)}: {interval(low.trait)} at {label(low)}, "
        f"{interval(high.trait)} at {label(high)}."
    )


def _unsteered(summary: SweepSummary) -> str:
    zero = next(iter(summary.steered), None)
    if zero is None or zero.trait.mean is None:
        return f"{title_of(summary.trait)} of the unsteered model was not scored."
    return f"Unsteered, the model scores {interval(zero.trait)} on {summary.trait}."


def _control(summary: SweepSummary) -> str:
    """Return whether the vector beats the random direction, without overstatement."""
    if summary.control is None:
        return ""
    overall = summary.control.overall
    if overall.interval.mean is None:
        return "The vector could not be compared with the random direction."
    if overall.p is None:
        return "With one question the vector cannot be tested against the random direction."
    draws = summary.control.draws
    random = "a random direction" if draws == 1 else f"{draws} random directions"
    verdict = {
        1: f"The vector beats {random} of the same norm",
        -1: f"The vector does worse than {random} of the same norm",
        0: f"The vector is not clear of {random} of the same norm",
    }[direction_of(overall)]
    return (
        f"{verdict}: {change(overall.interval)} points in the expected direction, paired by "
        f"question and averaged over the coefficients (p {p_equals(overall.p)}"
        f"{unclear_of(overall, '; ')})."
    )


def least_p(questions: int, tests: int) -> float:
    """Return the least p value that a sign-flip test can reach, after Holm's correction."""
    return min(1.0, tests * 2 / 2**questions)


def _verb(summary: SweepSummary, low: ConditionSummary, high: ConditionSummary) -> str:
    """Return how the trait moves between two ends, by their corrected tests against 0."""
    if low.trait.low is None or high.trait.low is None:
        return "has no intervals, so no change can be claimed"
    ends = ((-1, low.from_zero), (1, high.from_zero))
    moved = {side * direction_of(each) for side, each in ends if each is not None}
    if 1 in moved and -1 not in moved:
        return "rises with the coefficient"
    if -1 in moved and 1 not in moved:
        return "falls with the coefficient"
    slope, p = summary.fit.slope.value, summary.fit.p
    if slope is not None and p is not None and p < CLEAR:
        return (
            f"{'rises' if slope > 0 else 'falls'} on the whole (by its slope, p {p_equals(p)}), "
            f"which {questions_line(summary)} cannot show at an end; persona-lora plan says how "
            "many can"
        )
    tests = sum(each.from_zero is not None for each in summary.steered)
    least = least_p(_questions(summary), tests)
    if least >= CLEAR:
        return (
            f"cannot be shown to change by {_questions(summary)} questions (the least p value "
            f"possible is {p_value(least)})"
        )
    told = [
        f"{said} at {label(end)}"
        for end in (low, high)
        if end.from_zero is not None and (said := unclear_of(end.from_zero))
    ]
    known = f" ({', '.join(told)})" if told else ""
    return f"does not clearly change with the coefficient{known}"


def coherent_line(summary: SweepSummary) -> str:
    """Return the range of coefficients over which answers stay coherent, as a sentence."""
    span = summary.coherent_range
    if span.reason is not None:
        return f"There is no coherent range: {span.reason}."
    zero = next((each.coherence for each in summary.steered if each.coefficient == 0), None)
    beside = f" ({number(zero.mean)} unsteered)" if zero is not None else ""
    if len(span.coefficients) == len(summary.steered):
        where = "over the whole sweep"
    else:
        where = f"from {coefficient(span.low)} to {coefficient(span.high)}"
    return f"Coherence stays at its limit of {span.threshold:g} or above{beside} {where}."


def _prompts(summary: SweepSummary) -> str:
    sentence = prompt_alone(summary.reference("prompt_pos"), summary.reference(NEUTRAL))
    compared = [each for each in summary.prompt_comparisons if each.prompt == "prompt_pos"]
    gap = compared[0].difference.interval if compared else None
    if not sentence or gap is None or gap.mean is None or compared[0].difference.p is None:
        return sentence
    verdict = {1: "scores higher than", -1: "scores lower than", 0: "is not clear of"}[
        direction_of(compared[0].difference)
    ]
    steered = f"coefficient {coefficient(compared[0].coefficient)}"
    if summary.method == UNSTEERED:
        steered = "the unsteered model"
    verdict = (
        f"{verdict} the positive prompt (paired difference {interval(gap)}"
        f"{unclear_of(compared[0].difference, '; ')})"
    )
    return f"{sentence[:-1]}; {steered} {verdict}."


def prompt_alone(reference: ConditionSummary | None, neutral: ConditionSummary | None) -> str:
    """Return what the positive system prompt alone reaches, and neutral ones; "" if not asked."""
    if reference is None or reference.trait.mean is None:
        return ""
    said = f"The positive system prompt alone reaches {interval(reference.trait)}"
    over = reference.over_neutral
    if neutral is None or over is None or over.interval.mean is None:
        return f"{said}."
    gap = f"difference {change(over.interval)}{unclear_of(over, ', ')}"
    return f"{said}, neutral ones {interval(neutral.trait)} ({gap})."


def short_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return paths in short: as many of their last folders as tell them apart, and name one.

    A difference lies in ``evil/diff``, and "diff" alone names nothing.
    """
    parts = {path: Path(path).parts for path in paths}
    fewest = 1 + any(each[-1:] == ("diff",) for each in parts.values())
    for size in range(fewest, max(map(len, parts.values()), default=0)):
        short = {path: "/".join(each[-size:]) for path, each in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {path: path for path in parts}
