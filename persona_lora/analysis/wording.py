"""Numbers and findings in words: the same wording in plots, reports and on the command line."""

from __future__ import annotations

from persona_lora.analysis.resampling import Estimate, Interval
from persona_lora.analysis.summary import ConditionSummary, SweepSummary

PROMPT_LABELS = {"prompt_pos": "positive prompt", "prompt_neg": "negative prompt"}
NONE = "–"
_MINUS = "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 0) -> str:
    """Return a rounded number with a true minus sign, or a dash for None."""
    if value is None:
        return NONE
    # Rounding first, and adding 0.0, keeps "−0" from being printed.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", _MINUS)


def significant(value: float | None) -> str:
    """Return a small positive number with two significant digits, or a dash for None."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    return f"{value:#.2g}".rstrip(".").replace("-", _MINUS)


def coefficient(value: float | None) -> str:
    """Return a coefficient with its sign: "+1.5", "0", "−2"."""
    if value is None:
        return NONE
    return (f"{value:+g}" if value else "0").replace("-", _MINUS)


def interval(value: Interval | Estimate, digits: int = 0) -> str:
    """Return "71 [64, 77]", or without brackets where there is no interval."""
    centre = value.mean if isinstance(value, Interval) else value.value
    if value.low is None or value.high is None:
        return number(centre, digits)
    return f"{number(centre, digits)} [{number(value.low, digits)}, {number(value.high, digits)}]"


def p_value(p: float | None) -> str:
    """Return a p value to three digits, "< 0.001" below."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def title_of(trait: str) -> str:
    """Return a trait's name as a title."""
    words = trait.replace("_", " ")
    return words[:1].upper() + words[1:]


def label(condition: ConditionSummary) -> str:
    """Return what a condition is called in a table."""
    if condition.coefficient is not None:
        return coefficient(condition.coefficient)
    return method_label(condition.method)


def method_label(method: str) -> str:
    """Return what a method without a coefficient is called."""
    return PROMPT_LABELS.get(method, method.replace("_", " "))


def headline(summary: SweepSummary) -> str:
    """Return the finding in two or three sentences, with intervals and without overstatement."""
    sentences = [_change(summary), coherent_line(summary), _prompts(summary)]
    return " ".join(sentence for sentence in sentences if sentence)


def statistics_line(summary: SweepSummary) -> str:
    """Return rank correlation, slope and R² with their intervals, on one line."""
    rho, fit, span = summary.rho_means, summary.fit, summary.coherent_range
    parts = [f"Spearman's ρ {interval(rho, 2)}" if rho.reason is None else _missing("ρ", rho)]
    if fit.slope.value is None:
        parts.append(_missing("slope", fit.slope))
    else:
        parts.append(f"slope {interval(fit.slope, 1)} per unit")
        parts.append(f"R² {number(fit.r_squared, 2)}")
        parts.append(f"fitted over {coefficient(span.low)} … {coefficient(span.high)}")
    return "  ·  ".join(parts)


def questions_line(summary: SweepSummary) -> str:
    """Return "20 questions"."""
    questions = _questions(summary)
    return "1 question" if questions == 1 else f"{questions} questions"


def sample_line(summary: SweepSummary) -> str:
    """Return how many questions and answers stand behind the numbers, and who judged them."""
    rows = sum(each.rows for each in summary.conditions)
    scored = sum(each.trait.n for each in summary.conditions)
    judges = dict.fromkeys([summary.trait_judge, summary.coherence_judge])
    judged = ", ".join(judge for judge in judges if judge) or "none"
    share = number(100 * scored / rows if rows else None)
    return (
        f"{questions_line(summary)}, {rows} answers, {share}% scored; judge: {judged}; "
        f"{_intervals(summary)}"
    )


def gaps(summary: SweepSummary) -> list[str]:
    """Return what could not be computed for a condition, and why, one sentence each."""
    sentences = []
    for each in summary.conditions:
        change = None if each.from_zero is None else each.from_zero.interval
        for name, value in (
            (title_of(summary.trait), each.trait),
            ("Coherence", each.coherence),
            ("Change from 0", change),
        ):
            if value is not None and value.reason is not None:
                sentences.append(f"{name} at {label(each)}: {value.reason}.")
    return sentences


def _questions(summary: SweepSummary) -> int:
    return max((each.questions for each in summary.conditions), default=0)


def _intervals(summary: SweepSummary) -> str:
    if _questions(summary) < 2:
        return "no intervals from one question"
    return f"intervals: {number(100 * summary.confidence)}% bootstrap over questions"


def _missing(name: str, estimate: Estimate) -> str:
    if estimate.value is None:
        return f"no {name} ({estimate.reason})"
    return f"{name} {number(estimate.value, 2)} ({estimate.reason})"


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
    return (
        f"{name} {_verb(low.trait, high.trait)}: {interval(low.trait)} at "
        f"{coefficient(low.coefficient)}, {interval(high.trait)} at "
        f"{coefficient(high.coefficient)}."
    )


def _verb(low: Interval, high: Interval) -> str:
    if low.low is None or low.high is None or high.low is None or high.high is None:
        return "has no intervals, so no change can be claimed"
    if low.high < high.low:
        return "rises with the coefficient"
    if high.high < low.low:
        return "falls with the coefficient"
    return "does not clearly change with the coefficient (the intervals overlap)"


def coherent_line(summary: SweepSummary) -> str:
    """Return the range of coefficients over which answers stay coherent, as a sentence."""
    span = summary.coherent_range
    if span.reason is not None:
        return f"There is no coherent range: {span.reason}."
    if len(span.coefficients) == len(summary.steered):
        return f"Answers stay coherent (mean at least {span.threshold:g}) over the whole sweep."
    return (
        f"Answers are coherent (mean at least {span.threshold:g}) from "
        f"{coefficient(span.low)} to {coefficient(span.high)}."
    )


def _prompts(summary: SweepSummary) -> str:
    reference = summary.reference("prompt_pos")
    if reference is None or reference.trait.mean is None:
        return ""
    sentence = f"The positive system prompt alone reaches {interval(reference.trait)}"
    compared = [each for each in summary.prompt_comparisons if each.prompt == "prompt_pos"]
    gap = compared[0].difference.interval if compared else None
    if gap is None or gap.mean is None or gap.low is None or gap.high is None:
        return sentence + "."
    verdict = (
        "scores higher" if gap.low > 0 else "scores lower" if gap.high < 0 else "is not clear of it"
    )
    return (
        f"{sentence}; coefficient {coefficient(compared[0].coefficient)} {verdict} "
        f"(paired difference {interval(gap)})."
    )
