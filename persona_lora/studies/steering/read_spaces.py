"""What a run on the two spaces found: its traits in both, over training seeds where there are some.

Reads rows that are there; a run of before, which has one seed and asked for no words, is read too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.figures import Picture
from persona_lora.report.resampling import holm
from persona_lora.report.scores import Row, grouped
from persona_lora.report.sections import Content, Image, Note, Table
from persona_lora.studies.steering.figure import render_spaces

METHODS = "weights", "activations"
# What families call the parts of a decoder layer; others (a mixer, a convolution) are neither.
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
MLP = ("mlp", "ffn", "feed_forward", "fc1", "fc2")
# The columns that hold measured numbers; all others say of what.
MEASURED = (
    *("cosine", "top_share", "effective_rank", "weights", "weights_plain", "activations"),
    *("top_share_plain", "effective_rank_plain", "value", "residual"),
)
SHAPE = "effective rank | largest direction's share | effective layers | attention, MLP"
FIRST_WORD = "as the first word of the answer"
WORDS = 6  # of a trait that are shown


@dataclass(frozen=True)
class Shape:
    """What differences of a trait are like in one geometry: effective ranks by module, and places.

    ``attention`` is the share of ‖ΔW‖² in attention, the rest being in MLPs (None where a module
    lies in neither, as far as its name tells), ``layers`` the effective number of layers that hold
    it, exp of the entropy of their shares. Both are of what lies in layers (NaN where nothing
    does).
    """

    ranks: Sequence[float]
    top_share: float
    attention: float | None
    layers: float


@dataclass(frozen=True)
class TraitInBoth:
    """A trait's differences: their shape, and what each does along the traits' vectors.

    ``shape`` is weighted by the model's inputs and ``plain`` beside it is not; of a run of before,
    which has the plain one alone, that is ``shape``, and ``plain`` is None. ``cosines`` are those
    of the shift with the own vector and ``nearest`` the traits whose vector is nearest, by
    training seed.
    """

    trait: str
    shape: Shape
    plain: Shape | None
    cosines: Sequence[float]
    nearest: Sequence[str]


@dataclass(frozen=True)
class InBoth:
    """What both spaces have in common: by trait, by pairs of traits, and over training seeds.

    ``p_agreement`` and ``p_recognition`` are corrected together (Holm). ``same`` and ``different``
    are (weighted, plain) cosines of diffs of two seeds, of one trait and of two.
    """

    layer: int
    traits: Sequence[TraitInBoth]
    others: Sequence[float]
    seeds: int
    pairs: int
    rho: float | None
    p_agreement: float | None
    recognised: int
    n: int
    p_recognition: float | None
    same: Sequence[tuple[float, float]] = ()
    different: Sequence[tuple[float, float]] = ()
    words: Sequence[Row] = field(default=(), repr=False)

    @property
    def own(self) -> list[float]:
        """The cosines of all shifts with the vector of their own trait."""
        return [cosine for each in self.traits for cosine in each.cosines]

    @property
    def plain(self) -> list[Shape]:
        """The plain shapes of all traits, where weighted ones stand beside."""
        return [each.plain for each in self.traits if each.plain is not None]


def read_spaces(run: Run) -> InBoth:
    """Return what the run found."""
    layer = run.record["config"]["layer"]
    at = [row for row in run.read("shifts") if row["layer"] == layer]
    spectra = grouped(run.read("spectra"), lambda row: row["trait"])
    traits = [
        _trait(trait, spectra[trait], own)
        for trait, own in grouped(at, lambda row: row["trait"]).items()
    ]
    (agreed,) = run.read("agreement")
    (known,) = run.read("recognition") or [{"p": None}]
    p_agreement, p_recognition = holm([agreed["p"], known["p"]])
    alike = grouped(run.read("seeds"), lambda row: row["trait"] == row["other"])
    same, different = (
        [(row["weights"], row["weights_plain"]) for row in alike.get(which, ())]
        for which in (True, False)
    )
    nearest = [(each.trait, name) for each in traits for name in each.nearest]
    return InBoth(
        layer,
        traits,
        [abs(row["cosine"]) for row in at if row["trait"] != row["other"]],
        len({_seed_of(row) for row in at}),
        agreed["n"],
        agreed["rho"],
        p_agreement,
        sum(trait == name for trait, name in nearest),
        len(nearest),
        p_recognition,
        same,
        different,
        run.read("words"),
    )


def _seed_of(row: Row) -> str:
    return str(row.get("seed", ""))


def _trait(trait: str, spectra: Sequence[Row], shifts: Sequence[Row]) -> TraitInBoth:
    by_seed = grouped(shifts, _seed_of).values()
    return TraitInBoth(
        trait,
        _shape(spectra),
        _shape(spectra, "_plain") if weighted(spectra) else None,
        [row["cosine"] for row in shifts if row["other"] == trait],
        [max(own, key=lambda row: row["cosine"])["other"] for own in by_seed],
    )


def _shape(spectra: Sequence[Row], geometry: str = "") -> Shape:
    squares = pd.DataFrame(
        [{**row, "part": _part_of(row), "square": row[f"norm{geometry}"] ** 2} for row in spectra]
    )
    inside = squares.dropna(subset="layer")  # an output head lies in no layer
    shares = inside["square"] / inside["square"].sum()
    by_layer = shares.groupby(inside["layer"]).sum()
    known = inside["part"].isin((*ATTENTION, *MLP)).all() and len(inside)
    return Shape(
        squares[f"effective_rank{geometry}"].tolist(),
        float(squares[f"top_share{geometry}"].median()),
        float(shares[inside["part"].isin(ATTENTION)].sum()) if known else None,
        float(np.exp(-(by_layer * np.log(by_layer)).sum())) if len(inside) else np.nan,
    )


def _part_of(row: Row) -> str:
    """Return the part of its decoder layer that a module lies in; nothing where it is in none."""
    return str(row["module"].partition(f".{row['layer']}.")[2].partition(".")[0])


def mean_over_seeds(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return rows whose measured numbers are means over training seeds.

    What a key does not tell, as the layer of an output head, is one more value of it, NaN.
    """
    each_has_its_own = ["seed", "module", "norm", "norm_plain"]
    frame = pd.DataFrame(list(rows)).drop(columns=each_has_its_own, errors="ignore")
    values = [name for name in frame if name in MEASURED]
    keys = [name for name in frame if name not in MEASURED]
    means = frame.groupby(keys, sort=False, dropna=False)[values].mean()
    return means.reset_index().to_dict("records")


def weighted(spectra: Iterable[Row]) -> bool:
    """Return whether spectra are weighted by the model's inputs; those of before are plain."""
    return all("norm_plain" in row for row in spectra)


def shape_line(found: InBoth, value: Callable[[Sequence[Shape]], str]) -> str:
    """Return a number of all traits' shapes, with the plain one in brackets where there are two."""
    own = value([each.shape for each in found.traits])
    return f"{own} weighted by inputs (plain {value(found.plain)})" if found.plain else own


def spaces_picture(run: Run) -> Picture:
    """Return the picture of the run: means over training seeds."""
    parts = ("shifts", "spectra", "cosines", "interference")
    return render_spaces(*(mean_over_seeds(run.read(part)) for part in parts))


def spaces_content(run: Run) -> Content:
    """Return the section on weight space and activation space."""
    found, title = read_spaces(run), "Weights and activations: two spaces"
    first, *others = lines_of(found)
    cosines = mean_over_seeds(run.read("cosines"))
    both = all("weights_plain" in row for row in cosines)
    columns = {
        f"Cosine of differences, {'weighted' if both else 'plain'}": "weights",
        **({"plain": "weights_plain"} if both else {}),
        "of vectors": "activations",
    }
    rows = (
        [row["trait"], row["other"], *(wording.number(row[key], 3) for key in columns.values())]
        for row in cosines
    )
    pairs = Table.of(" | ".join(("Trait", "Other", *columns)), rows, "Pairs of traits")
    sums = Table.of(
        "Method | Trait | Other | Residual",
        (
            [row["method"], row["trait"], row["other"], wording.number(row["residual"], 3)]
            for row in mean_over_seeds(run.read("linearity"))
        ),
        "Two at once against the sum",
        "All directions are at equal effect. Residual: ‖s₁₂ − s₁ − s₂‖ / ‖s₁ + s₂‖ of the last "
        "layer's mean shift; a trait with itself has twice the coefficient. Vectors act at all "
        "positions here. Pairs share traits: the p-value of ρ permutes the traits of one space "
        "(Mantel).",
    )
    image = Image.of(spaces_picture(run), f"{title}. {first}")
    notes = [Note(line, "") for line in (first, *others)]
    words = [words_table(found)] if found.words else []
    traits = [traits_table(found), *plain_table(found)]
    return Content(title, first, (*notes, image, *traits, *words, pairs, sums))


def lines_of(found: InBoth) -> list[str]:
    """Return what was found in sentences: by traits, over pairs, and over training seeds."""
    seeds = "" if found.seeds == 1 else f", each trained {found.seeds} times"
    by = "" if found.p_recognition is None else f" (p {wording.p_equals(found.p_recognition)})"
    lines = [
        f"At layer {found.layer} the shift of the hidden states under a difference has a cosine of "
        f"{spread(found.own)} with the vector of its trait, and of {spread(found.others)}, in "
        f"absolute value, with others' (median [quartiles], {len(found.traits)} traits{seeds}); "
        f"the own vector is the nearest for {found.recognised} of {found.n}{by}.",
        f"Over {found.pairs} pairs of traits the cosines of both spaces have a Spearman's ρ of "
        f"{wording.number(found.rho, 2)} (p {wording.p_equals(found.p_agreement)}).",
    ]
    if found.same:
        lines.append(
            "Differences of one trait that were trained with two seeds have a weighted cosine of "
            f"{spread([w for w, _ in found.same])} (plain {spread([p for _, p in found.same])}), "
            f"those of two traits {spread([w for w, _ in found.different])} (plain "
            f"{spread([p for _, p in found.different])})."
        )
    return lines


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return a median with quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return wording.between(middle, low, high, digits)


def _range(values: Sequence[float]) -> str:
    """Return a mean with the least and the largest value, where there are several."""
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    return wording.between(float(np.mean(values)), low, high, 2)


def traits_table(found: InBoth) -> Table:
    """Return what each trait's differences are like, and whose vector is near what they do."""
    weighing = "weighted by the model's inputs" if found.plain else "plain"
    rows = (
        (
            wording.title_of(each.trait),
            *_shape_cells(each.shape),
            _range(each.cosines),
            f"{sum(name == each.trait for name in each.nearest)} of {len(each.nearest)}",
        )
        for each in found.traits
    )
    return Table.of(
        f"trait | {SHAPE} | cosine of the shift with its vector | nearest",
        rows,
        "Differences by trait",
        "Effective: exp of the entropy of the shares of ‖·‖², of singular directions in a module, "
        f"and of layers; ‖·‖ is {weighing}. Attention, MLP: shares of what lies in layers. "
        "Cosines: mean [least, largest] over training seeds. Nearest: for how many of its "
        "differences the own vector is.",
    )


def plain_table(found: InBoth) -> list[Table]:
    """Return what differences are like in plain weight space, beside weighted ones: none or one."""
    rows = [
        (wording.title_of(each.trait), *_shape_cells(each.plain))
        for each in found.traits
        if each.plain is not None
    ]
    told = "By the Frobenius norm of ΔW, whatever flows through its modules."
    return [Table.of(f"trait | {SHAPE}", rows, "The same, plain", told)] if rows else []


def _shape_cells(shape: Shape) -> tuple[str, ...]:
    attention = wording.NONE
    if shape.attention is not None:
        attention = f"{wording.percent(shape.attention)}, {wording.percent(1 - shape.attention)}"
    return (
        spread(shape.ranks, 1),
        wording.percent(shape.top_share),
        wording.number(shape.layers, 1),
        attention,
    )


def words_table(found: InBoth, place: str = FIRST_WORD) -> Table:
    """Return the words that differences and vectors make likelier, the surest first."""
    rows = (
        (
            wording.title_of(each.trait),
            *(" ".join(_top(found, m, each.trait, place)) for m in METHODS),
        )
        for each in found.traits
    )
    same, other = (_overlap(found, place, alike) for alike in (True, False))
    across = (
        f" Two seeds of a trait share {wording.percent(same)} of them, two traits "
        f"{wording.percent(other)}."
        if same is not None
        else ""
    )
    return Table.of(
        "trait | by the difference | by the vector",
        rows,
        f"Words made likelier, {place}",
        "Of the tokens that the model ever says those whose log-probability grows most, on "
        "prompts alone; of several training seeds those that most of them have." + across,
    )


def _ups(found: InBoth, method: str, place: str) -> dict[tuple[str, str], dict[str, float]]:
    """Return by trait and seed the words that become likelier, with their change."""
    rows = (
        row for row in found.words
        if (row["method"], row["place"]) == (method, place) and row["change"] > 0
    )  # fmt: skip
    by = grouped(rows, lambda row: (row["trait"], row["seed"]))
    return {at: {row["text"]: row["change"] for row in own} for at, own in by.items()}


def _top(found: InBoth, method: str, trait: str, place: str) -> list[str]:
    changes: dict[str, list[float]] = {}
    for (own, _), words in _ups(found, method, place).items():
        for text, change in words.items():
            if own == trait:
                changes.setdefault(text, []).append(change)
    surest = sorted(changes, key=lambda text: (-len(changes[text]), -float(np.mean(changes[text]))))
    return [wording.token(text) for text in surest[:WORDS]]


def _overlap(found: InBoth, place: str, same: bool) -> float | None:
    """Return the mean share of words that two differences of other seeds have in common."""
    words = _ups(found, METHODS[0], place)
    shares = [
        len(set(words[one]) & set(words[other])) / min(len(words[one]), len(words[other]))
        for one, other in combinations(words, 2)
        if one[1] != other[1] and (one[0] == other[0]) is same
    ]
    return float(np.mean(shares)) if shares else None
