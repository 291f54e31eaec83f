"""Blind rating sheets for people, and what their ratings say.

A sheet shows prompt and answer beside the persona's profile, in an order drawn by a seed, and not
which condition an answer comes from: that is in a key file of its own, which raters do not get.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError
from persona_lora.core.files import (
    ensure_writable_folder,
    read_csv,
    read_json,
    remove,
    write_csv,
    write_json,
    write_text,
)
from persona_lora.core.personas import load_persona
from persona_lora.core.runs import Output, Run
from persona_lora.report import wording
from persona_lora.report.resampling import FITS, Interval, bootstrap_mean
from persona_lora.report.scores import grouped
from persona_lora.report.sections import Table, fill_template

RATINGS = ("1", "2", "3", "4", "5")
COLUMNS = ("item", "persona", "prompt", "answer", "rating")
KEY, SHEET, PAGE = "key.json", "sheet.csv", "sheet.html"


class Sheets(NamedTuple):
    """What was written: how many items, and where."""

    items: int
    csv: Path
    page: Path
    key: Path


class Agreement(NamedTuple):
    """How two raters (or a rater and the judge) agree over the ``n`` items that both rated.

    ``kappa`` is Cohen's with quadratic weights (None against a judge, whose scores are no whole
    numbers), ``spearman`` Spearman's ρ; None where undefined.
    """

    first: str
    second: str
    n: int
    kappa: float | None
    spearman: float | None


@dataclass(frozen=True)
class HumanFits:
    """Mean ratings by condition with 95% intervals over prompts, and every agreement."""

    fits: dict[str, Interval]
    agreements: tuple[Agreement, ...]

    def table(self) -> Table:
        """Return the mean rating of every condition."""
        rows = (
            [name, wording.interval(fit, 2), str(fit.n_questions), str(fit.n)]
            for name, fit in self.fits.items()
        )
        return Table.of("condition | rating (1–5) | prompts | ratings", rows)

    def lines(self) -> Iterator[str]:
        """Say how raters and judge agree."""
        for each in self.agreements:
            kappa = "" if each.kappa is None else f"weighted κ {each.kappa:.2f}, "
            yield (
                f"{each.first} and {each.second}: {kappa}ρ {wording.number(each.spearman, 2)} over "
                f"{each.n} answers"
            )


def write_sheets(
    run: Run,
    output: Output | Path,
    *,
    persona: str,
    conditions: Sequence[str] | None = None,
    prompts: int = 8,
    seed: int = 0,
    personas: Path | None = None,
) -> Sheets:
    """Write a blind sheet (CSV and a page to click in) and its key from a run's held-out rows.

    Takes the first ``prompts`` prompts under every condition. Items bear a mark of all that is
    asked, so that ratings of another sheet are not taken for this one's. Raises UserError for a
    persona or a condition that the run does not hold, and for a folder that holds sheets, which
    people may have filled in, unless they are to be overwritten.
    """
    output = Output.of(output)
    folder = output.path
    if (folder / KEY).is_file() and not output.overwrite:
        raise UserError(
            f"{folder} holds sheets, with ratings perhaps; choose another --output or pass "
            "--overwrite"
        )
    rows = [row for row in run.read("held_out") if row["persona"] == persona]
    if not rows:
        raise UserError(f"{run.folder} holds no held-out answers of {persona!r}")
    known = list(dict.fromkeys(row["condition"] for row in rows if row["prompt_id"] < prompts))
    chosen = list(conditions or known)
    missing = [name for name in chosen if name not in known]
    if missing:
        raise UserError(f"no condition {missing[0]!r} in {run.folder}; it has {', '.join(known)}")
    picked = [row for row in rows if row["condition"] in chosen and row["prompt_id"] < prompts]
    random.Random(seed).shuffle(picked)
    sheet = f"s{digest_of(picked)[:4]}"  # a letter first: spreadsheets make dates of numbers
    items = {f"{sheet}-{number}": row for number, row in enumerate(picked, start=1)}
    about = load_persona(persona, personas)
    profile = str(about.read("persona_profile.txt"))
    ensure_writable_folder(folder)
    remove(folder / KEY)  # the key comes last: what lacks it is no set of sheets
    cells = [{**row, "item": item, "rating": ""} for item, row in items.items()]
    write_csv(folder / SHEET, COLUMNS, cells)
    told = {"profile": profile.strip(), "samples": about.samples(), "ratings": RATINGS}
    write_text(folder / PAGE, fill_template("ratings.html.j2", items=cells, **told))
    write_json(
        folder / KEY,
        {
            "persona": persona,
            "items": {
                item: {name: row[name] for name in ("condition", "prompt_id", "score")}
                for item, row in items.items()
            },
        },
    )
    return Sheets(len(items), folder / SHEET, folder / PAGE, folder / KEY)


def read_ratings(folder: Path, files: Sequence[Path]) -> HumanFits:
    """Join the ratings of one or more people with the key.

    Every file is one rater: a CSV with ``item`` and ``rating`` (1–5; an empty one is left out).
    Raises UserError for an unknown item, one that is rated twice, a rating that is none, or a file
    without ratings.
    """
    key = folder / KEY
    if not key.is_file():
        raise UserError(f"{key} does not exist; give the folder that the sheets were written to")
    items: Mapping[str, Any] = read_json(key)["items"]
    by_rater = {path.stem: _ratings(path, items) for path in files}
    if len(by_rater) < len(files):
        raise UserError("two rating files have the same name; a rater is known by the file's name")
    given = [pair for ratings in by_rater.values() for pair in ratings.items()]
    fits: dict[str, dict[int, list[float | None]]] = {}
    for item, rating in given:
        by_prompt = fits.setdefault(items[item]["condition"], {})
        by_prompt.setdefault(items[item]["prompt_id"], []).append(float(rating))
    pairs = [
        _agree((one, other), by_rater[one], by_rater[other], whole=True)
        for one, other in itertools.combinations(by_rater, 2)
    ]
    judged = {item: each["score"] for item, each in items.items() if each["score"] is not None}
    by_item = grouped(given, lambda pair: pair[0])
    means = {item: fmean(rating for _, rating in own) for item, own in by_item.items()}
    pairs.append(_agree(("people", "judge"), means, judged, whole=False))
    means_of = {name: bootstrap_mean(fits[name], scale=FITS) for name in sorted(fits)}
    return HumanFits(means_of, tuple(pairs))


def _ratings(path: Path, items: Mapping[str, Any]) -> dict[str, int]:
    ratings = {}
    for number, row in enumerate(read_csv(path, ("item", "rating")), start=1):
        where = f"{path}: row {number}"
        item, rating = (str(row.get(name, "")).strip() for name in ("item", "rating"))
        if item not in items:
            raise UserError(f"{where}: no item {item!r} in the key; is it another sheet's?")
        if rating and rating not in RATINGS:
            raise UserError(f"{where}: a rating is 1, 2, 3, 4 or 5, got {rating!r}")
        if rating and item in ratings:
            raise UserError(f"{where}: {item} is rated a second time; leave one of its lines")
        if rating:
            ratings[item] = int(rating)
    if not ratings:
        raise UserError(f"{path} holds no ratings; fill in the column rating with 1 to 5")
    return ratings


def _agree(
    names: tuple[str, str], first: Mapping[str, float], second: Mapping[str, float], *, whole: bool
) -> Agreement:
    both = sorted(set(first) & set(second))
    x, y = [first[item] for item in both], [second[item] for item in both]
    varied = len(set(x)) > 1 and len(set(y)) > 1
    kappa = None
    if whole and varied:
        kappa = float(cohen_kappa_score(x, y, labels=range(1, 6), weights="quadratic"))
    rho = float(spearmanr(x, y).statistic) if varied else None
    return Agreement(*names, len(both), kappa, rho)
