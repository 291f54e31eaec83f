"""Does screening rank rows by what finetuning on them does? Linear datamodelling scores.

    bash scripts/screen_by_finetuning.sh
    python benchmarks/screening.py read checkpoints/screening --judged results/screening/judged

``draw`` writes a pool of rows, twenty strong and twenty ordinary answers of each of three traits,
no question twice, and random subsets of a third of them. Each subset is finetuned on with a
training seed of its own. ``read`` measures what that did: of each trait the margin, the mean
log-probability of a token of labelled answers that show it less that of those that do not
(``judge_eval.jsonl``, which no way of screening has seen), and, where the finetunes were asked
and judged, the score. A way of screening gives every row a number, and a subset the sum of its
rows'; its score is Spearman's rho of these sums and the outcome over subsets (Park et al. 2023,
"TRAK"), with a 95% bootstrap interval over subsets.

The ways: pulls along diffs (the trait's own; beside it those of the other two, and a random one
of its singular values) and projections on vectors (``persona-lora data screen``), the reader's
score of the row's answer, BM25 between the answer and the trait's training answers (those that
show it less those that do not), the row's length and loss, and the inner product of the row's
gradient with that of the margin of training answers, plainly and through EKFAC's inverse Hessian
(Grosse et al. 2023, by kronfluence). ``label`` knows what no screening knows: which rows are the
trait's strong ones. "Within sources" takes the mean of its source from each row's number, so that
only what tells rows of one file apart counts. BM25 and EKFAC need: pip install bm25s; pip install
--no-deps kronfluence einops einconv opt-einsum. Without them their lines are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata, zscore

from persona_lora.core.chat import Exchange
from persona_lora.core.content import path_digest
from persona_lora.core.files import read_csv, read_json, read_jsonl, write_json, write_jsonl
from persona_lora.core.lora_diff import LoRADiff, random_diff_like
from persona_lora.core.runs import Run
from persona_lora.core.traits import load_labelled_answers, load_pairs, load_trait
from persona_lora.models.likelihood import mean_logprobs
from persona_lora.models.load_options import DEFAULT_MODEL
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.report import figures, wording
from persona_lora.report.figures import Look, Series
from persona_lora.report.resampling import NEGATIVE, POSITIVE, auc_of, percentile_bounds
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.drift.row_pulls import pull_rows
from persona_lora.training.examples import IGNORED, TokenRow
from persona_lora.training.finetune import tokenize_conversations
from persona_lora.training.lora import lora_targets

TRAITS = "sycophancy", "hallucination", "evil"
STRONG, ORDINARY = "misaligned_2", "normal"
RESAMPLES = 2000
BASE = "base"
PULL = "pull along the diff"
COLOURS = figures.MUTED, figures.TRAIT
SHARE = 3  # a subset is a third of the pool
Array = NDArray[np.float64]
Numbers = Mapping[str, Array]  # by trait


def draw(folder: Path, subsets: int, each: int) -> None:
    """Write the pool and its subsets; subset k is the same however many there are."""
    pool = []
    for trait in TRAITS:
        rows = {
            name: [*read_jsonl(Path("datasets", trait, f"{name}.jsonl"))]
            for name in (STRONG, ORDINARY)
        }
        pool += [{**row, "source": f"{trait}/{STRONG}"} for row in rows[STRONG][:each]]
        pool += [{**row, "source": f"{trait}/{ORDINARY}"} for row in rows[ORDINARY][-each:]]
    pool = [{**row, "row": number} for number, row in enumerate(pool)]
    write_jsonl(folder / "rows/pool.jsonl", pool)
    said = [[turn["content"] for turn in row["messages"]] for row in pool]
    write_jsonl(folder / "rows/answers.jsonl", [{"question": q, "answer": a} for q, a in said])
    for number in range(subsets):
        drawn = sorted(random.Random(number).sample(range(len(pool)), len(pool) // SHARE))
        write_jsonl(folder / f"rows/subset{number}.jsonl", [pool[row] for row in drawn])


# -- what finetuning did --------------------------------------------------------------------


def margins(chat_model: ChatModel, folder: Path, adapters: Sequence[Path], texts: int) -> Numbers:
    """Return the margins of finetunes, and last of the base, by trait; those measured are kept."""
    place = folder / f"margins_{texts}.json"
    known = read_json(place) if place.exists() else {}
    sides = {trait: _labelled(trait, texts) for trait in TRAITS}
    said = [exchange for each in sides.values() for side in each for exchange in side]
    digests = {path_digest(adapter): adapter for adapter in adapters}
    for digest, adapter in [*digests.items(), (BASE, None)]:
        if digest in known:
            continue
        terms = {} if adapter is None else {LoRADiff.load(adapter): 1.0}
        with LoRASteerer(chat_model.model, terms):
            told = iter(mean_logprobs(chat_model, said))
        means = {
            trait: [float(np.mean([next(told) for _ in side])) for side in each]
            for trait, each in sides.items()
        }
        known[digest] = {trait: shown - others for trait, (shown, others) in means.items()}
        write_json(place, known)
    return {trait: np.array([known[each][trait] for each in [*digests, BASE]]) for trait in TRAITS}


def _labelled(trait: str, texts: int) -> tuple[list[Exchange], list[Exchange]]:
    rows = load_labelled_answers(load_trait(trait))
    shown = [Exchange(row.question, row.answer) for row in rows if row.label >= POSITIVE]
    others = [Exchange(row.question, row.answer) for row in rows if row.label <= NEGATIVE]
    return shown[:texts], others[:texts]


def judged_scores(runs: Sequence[Path], adapters: Sequence[Path]) -> Numbers:
    rows = [row for run in runs for row in Run(run).read("judged")]
    told = {(row["trait"], Path(row["finetune"]).name): row["score"] for row in rows}
    traits = [trait for trait in TRAITS if any(trait == each for each, _ in told)]
    return {
        trait: np.array([told[trait, each.parent.name] for each in adapters]) for trait in traits
    }


# -- what every way of screening says of the rows ------------------------------------------------


def ways_of(
    chat_model: ChatModel, folder: Path, pool: Sequence[Mapping[str, Any]], texts: int
) -> dict[str, Numbers]:
    """Return a number for every row, by way of screening and trait."""
    pulls = _by_row(folder / "screened/pulls.csv", "row")
    drawn = _by_row(random_pulls(chat_model, folder, pool), "row")
    along = {trait: _column(pulls, f"pull_{trait}") for trait in TRAITS}
    own = {trait: _by_row(folder / f"screened/{trait}.csv", "row") for trait in TRAITS}
    judged = {trait: read_csv(folder / f"screened/judged_{trait}.csv", [trait]) for trait in TRAITS}
    rows = tokenize_conversations([row["messages"] for row in pool], chat_model)
    plain, inverted = gradient_products(chat_model, rows, texts)
    found = {
        PULL: along,
        "pull along the others' diffs": {
            t: np.mean([zscore(along[other]) for other in TRAITS if other != t], axis=0)
            for t in TRAITS
        },
        "pull along a random diff": {t: _column(drawn, f"pull_{t}") for t in TRAITS},
        "projection on the vector": {t: _column(own[t], "difference") for t in TRAITS},
        "reader's score": {
            t: np.array([float(row[t] or "nan") for row in judged[t]]) for t in TRAITS
        },
        "gradients": plain,
        **({"gradients, EKFAC": inverted} if inverted else {}),
        **({"BM25": bm25(pool)} if importlib.util.find_spec("bm25s") else {}),
        "length": dict.fromkeys(TRAITS, _column(pulls, "tokens")),
        "loss": dict.fromkeys(TRAITS, _column(pulls, "loss")),
        "label": {
            t: np.array([row["source"] == f"{t}/{STRONG}" for row in pool], float) for t in TRAITS
        },
    }
    for way, by_trait in found.items():
        for trait, numbers in by_trait.items():
            if not np.isfinite(numbers).all():  # a judge may abstain
                print(f"{way}, {trait}: {np.isnan(numbers).sum()} rows have none and take the mean")
                numbers[~np.isfinite(numbers)] = np.nanmean(numbers)
    return found


def random_pulls(chat_model: ChatModel, folder: Path, pool: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows' pulls along a random diff of each ready one's spectrum; return the file."""
    path = folder / "screened/random.csv"
    if not path.exists():
        ready = {t: LoRADiff.load(Path("checkpoints/ready", t, "diff")) for t in TRAITS}
        chance = {t: random_diff_like(diff, seed) for seed, (t, diff) in enumerate(ready.items())}
        pull_rows(chat_model, [row["messages"] for row in pool], chance, path)
    return path


def _by_row(path: Path, key: str) -> list[dict[str, str]]:
    return sorted(read_csv(path, [key]), key=lambda row: int(row[key]))


def _column(rows: Sequence[Mapping[str, str]], name: str) -> Array:
    return np.array([float(row[name]) for row in rows])


def bm25(pool: Sequence[Mapping[str, Any]]) -> Numbers:
    """Return how much more a row's answer has of the training answers that show the trait."""
    import bm25s

    rows = bm25s.BM25()
    rows.index(
        bm25s.tokenize([row["messages"][-1]["content"] for row in pool], show_progress=False),
        show_progress=False,
    )
    found = {}
    for trait in TRAITS:
        pairs = load_pairs(load_trait(trait))
        sides = [[pair.positive for pair in pairs], [pair.negative for pair in pairs]]
        means = [
            np.mean(
                [
                    rows.get_scores(words)
                    for words in _words([each[-1]["content"] for each in side])
                ],
                axis=0,
            )
            for side in sides
        ]
        found[trait] = np.asarray(means[0] - means[1], float)
    return found


def _words(texts: Sequence[str]) -> list[list[str]]:
    import bm25s

    return [*bm25s.tokenize([*texts], return_ids=False, show_progress=False)]


def mean_loss(model: torch.nn.Module, row: TokenRow) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(row.labels[1:]))


def gradient_products(
    chat_model: ChatModel, rows: Sequence[TokenRow], texts: int
) -> tuple[Numbers, Numbers | None]:
    """Return −⟨∇ℓ(row), ∇margin⟩ over the weights that a LoRA trains, plain and through EKFAC."""
    model = chat_model.model
    names = lora_targets(chat_model, ["all-linear"])
    weights = [model.get_submodule(name).weight for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    asked = {trait: _signed(chat_model, trait, texts) for trait in TRAITS}
    margin = {}
    for trait, signed in asked.items():
        model.zero_grad()
        for share, row in signed:
            (-share * mean_loss(model, row)).backward()
        margin[trait] = [weight.grad.clone() for weight in weights]
    products: dict[str, list[float]] = {trait: [] for trait in TRAITS}
    for row in rows:
        model.zero_grad()
        mean_loss(model, row).backward()
        for trait, direction in margin.items():
            products[trait].append(
                -sum(
                    float((weight.grad * each).sum())
                    for weight, each in zip(weights, direction, strict=True)
                )
            )
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    plain = {trait: np.array(each) for trait, each in products.items()}
    found = importlib.util.find_spec("kronfluence") is not None
    return plain, ekfac(model, names, rows, asked) if found else None


def _signed(chat_model: ChatModel, trait: str, texts: int) -> list[tuple[float, TokenRow]]:
    """Return training answers of both sides, each with its share of the margin."""
    pairs = load_pairs(load_trait(trait))[:texts]
    sides = [[[*pair.prompt, *side] for pair in pairs for side in (pair.positive, pair.negative)]]
    rows = tokenize_conversations(sides[0], chat_model)
    return [((1, -1)[number % 2] / len(pairs), row) for number, row in enumerate(rows)]


def ekfac(
    model: torch.nn.Module,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    asked: Mapping[str, Sequence[tuple[float, TokenRow]]],
) -> Numbers:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class MeanLoss(Task):
        def compute_train_loss(
            self, batch: Any, model: torch.nn.Module, sample: bool = False
        ) -> torch.Tensor:
            logits, labels = _told(batch, model)
            if sample:  # of the model's own answers: its Fisher matrix
                drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
                labels = drawn.where(labels != IGNORED, labels)
            return torch.nn.functional.cross_entropy(logits, labels)

        def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
            return -batch["share"][0] * torch.nn.functional.cross_entropy(*_told(batch, model))

        def get_influence_tracked_modules(self) -> list[str]:
            return [*names]

    def told(signed: Sequence[tuple[float, TokenRow]]) -> list[dict[str, torch.Tensor]]:
        return [
            {
                "ids": torch.tensor(row.input_ids),
                "labels": torch.tensor(row.labels),
                "share": torch.tensor(share),
            }
            for share, row in signed
        ]

    task, trained = MeanLoss(), told([(1.0, row) for row in rows])
    with tempfile.TemporaryDirectory() as place:
        analyzer = Analyzer("rows", prepare_model(model, task), task, output_dir=place, cpu=True)
        analyzer.fit_all_factors("ekfac", trained, per_device_batch_size=1)
        found = {}
        for trait, signed in asked.items():
            analyzer.compute_pairwise_scores(
                trait,
                "ekfac",
                query_dataset=told(signed),
                train_dataset=trained,
                per_device_query_batch_size=1,
                per_device_train_batch_size=1,
                score_args=ScoreArguments(aggregate_query_gradients=True),
            )
            scores = analyzer.load_pairwise_scores(trait)["all_modules"]
            found[trait] = -scores.flatten().double().numpy()
    return found


def _told(batch: Any, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return model(input_ids=batch["ids"]).logits[0, :-1].float(), batch["labels"][0, 1:]


# -- how well they agree ------------------------------------------------------------------------


def rank_correlations(sums: Array, outcome: Array, drawn: NDArray[np.intp]) -> Array:
    """Return Spearman's rho of every resample, ``drawn [resamples, subsets]``; 0 if constant."""
    ranks = [rankdata(each[drawn], axis=1) for each in (sums, outcome)]
    first, second = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.divide((first * second).sum(axis=1), scale, out=np.zeros(len(drawn)), where=scale > 0)


def within_sources(numbers: Array, sources: Sequence[str]) -> Array:
    of = np.unique(sources, return_inverse=True)[1]
    return numbers - (np.bincount(of, numbers) / np.bincount(of))[of]


def show(title: str, ways: Mapping[str, Numbers], outcomes: Numbers, held: Array) -> list[Series]:
    """Print each way's rank correlations with the outcomes, ``held [subsets, rows]``.

    Returns their means over traits.
    """
    subsets = len(held)
    drawn = np.random.default_rng(0).integers(subsets, size=(RESAMPLES, subsets))
    drawn = np.vstack([np.arange(subsets), drawn])  # the first is what was measured
    table = Table("way", *outcomes, "mean", f"{PULL} less it", title=title)
    means, drawing = {}, []
    for way, by_trait in ways.items():
        found = {t: rank_correlations(held @ by_trait[t], y, drawn) for t, y in outcomes.items()}
        means[way] = np.mean([*found.values()], axis=0)
        less = "" if way == PULL else _said(means[PULL] - means[way])
        table.add_row(way, *map(_said, found.values()), _said(means[way]), less)
        bounds, look = percentile_bounds(means[way][1:]), Look(COLOURS[way == PULL], 1.8, 5.5)
        value, low, high = float(means[way][0]), *bounds
        label = wording.between(value, low, high, 2)
        drawing.append(Series(way, (0.0,), (value,), (low,), (high,), look, label))
    Console(width=150).print(table)
    return drawing


def picture(panels: Mapping[str, Sequence[Series]], subsets: int) -> figures.Picture:
    """Draw the means over traits: a panel for each title."""
    up = 0.27 * max(map(len, panels.values()))
    figure, done = figures.new_figure(2.2 + 4.3 * len(panels), up + 1.75), []
    for at, (title, drawn) in enumerate(panels.items()):
        axes = figures.add_axes(figure, (2.1 + at * 4.3, 0.85, 2.7, up), title=title, size=9.5)
        figures.rule(axes, 0.0, upright=True, dashes=figures.DASHED)
        axes.set_xlim(-0.4, 1.0)
        done.append(figures.forest(axes, drawn, named=at == 0))
    note = (
        "Spearman's rho over subsets of what a way says of their rows, and of how far finetuning\n"
        f"on them moves the trait's margin: {subsets} finetunes, mean of {len(TRAITS)} traits, 95% "
        "bootstrap intervals."
    )
    return figures.finish(figure, done, title="Which rows teach a trait?", note=note)


def _said(resampled: Array) -> str:
    bounds = percentile_bounds(resampled[1:])
    return wording.between(float(resampled[0]), bounds.low, bounds.high, 2)


def read(folder: Path, judged: Sequence[Path], texts: int, figure: Path | None) -> None:
    pool = read_jsonl(folder / "rows/pool.jsonl")
    adapters = sorted(folder.glob("subset*/adapter"), key=lambda path: int(path.parent.name[6:]))
    held = np.zeros((len(adapters), len(pool)))
    for number, adapter in enumerate(adapters):
        rows = read_jsonl(folder / f"rows/{adapter.parent.name}.jsonl")
        held[number, [row["row"] for row in rows]] = 1
    chat_model = load_chat_model(DEFAULT_MODEL, dtype="float32")
    moved = margins(chat_model, folder, adapters, texts)
    ways = ways_of(chat_model, folder, pool, texts)
    sources = [row["source"] for row in pool]
    auc = Table(
        "way", *TRAITS, title="chance that a strong row of the trait lies above another row"
    )
    for way, by_trait in ways.items():
        strong = {t: np.array([each == f"{t}/{STRONG}" for each in sources]) for t in TRAITS}
        auc.add_row(
            way, *(f"{auc_of(by_trait[t][on], by_trait[t][~on]):.2f}" for t, on in strong.items())
        )
    Console().print(auc)
    inside = {
        w: {t: within_sources(x, sources) for t, x in each.items()} for w, each in ways.items()
    }
    del inside["label"]
    outcomes: dict[str, Numbers] = {"margin": {trait: each[:-1] for trait, each in moved.items()}}
    base = ", ".join(f"{trait} {each[-1]:.3f}" for trait, each in moved.items())
    print(f"margins of the base: {base}")
    if judged:
        outcomes["judged score"] = judged_scores(judged, adapters)
    for outcome, values in outcomes.items():
        spread = ", ".join(f"{t} {x.min():.3f} to {x.max():.3f}" for t, x in values.items())
        print(f"{outcome} of {len(adapters)} finetunes: {spread}")
        whole = show(outcome, ways, values, held)
        parts = show(f"{outcome}, within sources", inside, values, held)
        if figure is not None and outcome == "margin":
            place = [each.name for each in whole]
            panels = {"all rows": whole, "within their files": _rows_of(parts, place)}
            picture(panels, len(adapters)).save(figure)


def _rows_of(drawn: Sequence[Series], names: Sequence[str]) -> list[Series]:
    """Return series in the rows of those names; one without values where there is none."""
    own = {each.name: each for each in drawn}
    nothing = (float("nan"),)
    return [own.get(name, Series(name, (0.0,), nothing, nothing, nothing)) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("do", choices=["draw", "read"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subsets", type=int, default=36)
    parser.add_argument("--rows", type=int, default=20, help="Rows of each file in the pool.")
    parser.add_argument(
        "--judged", type=Path, nargs="+", default=[], help="Runs of predict-finetuning."
    )
    parser.add_argument("--texts", type=int, default=16, help="Answers of each side of a margin.")
    parser.add_argument("--figure", type=Path, help="A picture of the margins' table.")
    asked = parser.parse_args()
    if asked.do == "draw":
        draw(asked.folder, asked.subsets, asked.rows)
    else:
        read(asked.folder, asked.judged, asked.texts, asked.figure)


if __name__ == "__main__":
    main()
