"""Does every instrument find what was planted, and reject what was shuffled, on this machine?

An organism is planted whose truth is known (a direction in weights, an optimum, labels), and beside
it stands the same with its order or its directions drawn at random. An instrument has to find the
first and to make nothing of the second; one that raises an error has failed. Everything is drawn
from fixed seeds, and nothing is trained. Knows what each instrument should say; refuses to know how
it comes to say it.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from persona_lora.core import progress
from persona_lora.core.chat import COHERENCE, Conversation, Exchange
from persona_lora.core.errors import without_secrets
from persona_lora.core.lora_diff import BaseModel, LoRADiff, LoRAFactors, turned_diff
from persona_lora.core.options import NOBODY, SearchOptions
from persona_lora.core.personas import Coefficients
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.tensor_files import tensor_digest
from persona_lora.core.traits import Trait, load_pairs
from persona_lora.judges.canaries import show_canaries
from persona_lora.judges.choice import JUDGES, JudgeOptions, coherence_scorer
from persona_lora.judges.coherence import looped_words, shuffled_words
from persona_lora.judges.embedding import exchanges_of
from persona_lora.judges.labels import load_ratings
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.likelihood import TokenizedExchange, next_tokens, tokenize_exchange
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import (
    decoder_layers,
    decoder_linear_modules,
    features,
    hidden_size,
    oriented,
    weight_fingerprint,
    weight_of,
)
from persona_lora.models.weight_files import weights_of
from persona_lora.projections.inputs import ModuleInputs, kept_inputs, tokenized_prompts
from persona_lora.projections.weight_space import WeightProjection, project_adapter, project_weights
from persona_lora.report import wording
from persona_lora.report.resampling import bootstrap_mean, separation, sign_flip_ps
from persona_lora.report.sections import Table
from persona_lora.steering.activations import ActivationSteerer, DirectionAblation
from persona_lora.steering.bank import Bank, steer_live, steer_merged
from persona_lora.steering.directions import sum_pairs, vector_of
from persona_lora.steering.placement import find_modules
from persona_lora.steering.steerer import Steerer, Unsteered
from persona_lora.steering.weights import LoRAMerger, merged_weight
from persona_lora.studies.asking.run import open_run
from persona_lora.studies.drift.diagnosis import Subject, diagnose
from persona_lora.studies.drift.read_diagnosis import ENOUGH, read_diagnosis
from persona_lora.studies.drift.row_pulls import TRUSTED, pull_rows
from persona_lora.studies.personas.search import Value, search
from persona_lora.studies.steering.calibration import equal_effect_scales
from persona_lora.studies.steering.divergence import ordinary_texts, relative_weight_norm
from persona_lora.training.examples import IGNORED
from persona_lora.training.finetune import tokenize_conversations
from persona_lora.training.full_weights import near_factors

logger = logging.getLogger(__name__)

PROMPTS = 4  # that the command takes
RANK = 4
SIZE = 0.05  # ‖ΔW‖ / ‖W‖ of what is planted
PLANTED, SHUFFLED = "planted", "shuffled"
ROUNDING = 0.05  # of an effect: what a merge into weights of 16 bits may round away
NATS = 0.05
PAIRS = 32  # of answers, half of them held out
CLEAR = 14  # answers of each side that a judge is shown
DATA_SETS, QUESTIONS = 400, 20


class Found(NamedTuple):
    """What an instrument said of the organism and of the shuffled one, and whether that is right.

    ``planted`` is what there was to find.
    """

    planted: str
    found: str
    rejected: str
    finds: bool
    rejects: bool


@dataclass(frozen=True, eq=False)
class Bench:
    """What instruments are tried on: a model, a trait with data, prompts, and a scratch folder."""

    chat_model: ChatModel
    trait: Trait
    prompts: Sequence[str]
    folder: Path

    @cached_property
    def organism(self) -> LoRADiff:
        """The planted direction in weights."""
        return self.drawn(0)

    @cached_property
    def inputs(self) -> ModuleInputs:
        """What flows through the model's modules on the prompts."""
        return kept_inputs(self.chat_model, self.prompts)

    def drawn(self, seed: int) -> LoRADiff:
        """Return a random diff on all modules, ``SIZE`` times as large as they are."""
        model, generator = self.chat_model.model, torch.Generator().manual_seed(seed)
        factors = {}
        for name, module in decoder_linear_modules(model).items():
            out, width = features(module)
            A, B = (
                torch.randn(shape, generator=generator) for shape in ((RANK, width), (out, RANK))
            )
            factors[name] = LoRAFactors(A, B)
        base = BaseModel(self.chat_model.name, weight_fingerprint(model))
        diff = LoRADiff(factors, base, PLANTED, {"seed": seed})
        return diff * (SIZE / relative_weight_norm(self.chat_model, diff))

    def next_words(self, steerer: Steerer = Unsteered()) -> Tensor:
        """Return log-probabilities of the answers' first tokens, ``[prompts, vocabulary]``."""
        with steerer:
            ids = tokenized_prompts(self.chat_model, self.prompts)
            return next_tokens(self.chat_model, ids, 0)[1].logprobs


def _nats(p: Tensor, q: Tensor) -> float:
    """Return the mean KL(p ‖ q) of rows of log-probabilities."""
    return float((p.double().exp() * (p.double() - q.double())).sum(-1).mean())


# -- weights -----------------------------------------------------------------------------------


def merging(bench: Bench) -> Found:
    """Merging changes every module it names, and restoring leaves not one bit changed."""
    model, diff = bench.chat_model.model, bench.organism
    before, merger = _digests(model), LoRAMerger(model)
    for coefficient in (1.0, -0.7):
        merger.merge_lora_diff(diff, coefficient)
    merged = _digests(model)
    merger.restore_original_weights()
    changed, left = (
        sum(one != other for one, other in zip(before, now, strict=True))
        for now in (merged, _digests(model))
    )
    modules = len(diff.factors)
    return Found(
        f"a diff in {modules} modules, merged twice",
        f"{changed} weights changed",
        f"{left} differ after restoring",
        changed == modules,
        left == 0,
    )


def _digests(model: torch.nn.Module) -> list[str]:
    return [tensor_digest(each) for each in model.parameters()]


def live(bench: Bench) -> Found:
    """A live LoRA answers as the merged one, and not as another of the same size."""
    terms, other = {bench.organism: 1.0}, {bench.drawn(1): 1.0}
    chat_model = bench.chat_model
    merged = bench.next_words(steer_merged(chat_model, terms))
    effect = _nats(bench.next_words(), merged)
    gap, apart = (
        _nats(merged, bench.next_words(steer_live(chat_model, each))) for each in (terms, other)
    )
    return Found(
        f"a diff that moves the model by {effect:.3g} nats",
        f"{gap:.2g} nats between live and merged",
        f"{apart:.3g} nats to another diff, live",
        effect > 0 and gap <= ROUNDING * effect,
        apart > effect / 2,
    )


def calibration(bench: Bench) -> Found:
    """The coefficient for so many nats gives so many, merged and measured text by text."""
    chat_model, diff, prompts = bench.chat_model, bench.organism, bench.prompts[:2]
    bank = Bank(diffs={PLANTED: diff})
    (scale,) = equal_effect_scales(chat_model, bank, prompts, effect=NATS)
    texts = ordinary_texts(chat_model, prompts)
    once, twice = (
        _merged_nats(chat_model, diff, c, texts) for c in (scale.coefficient, 2 * scale.coefficient)
    )
    return Found(
        f"{NATS:g} nats asked of a diff",
        f"{once:.4f} nats at {scale.coefficient:.3g}, merged",
        f"{twice:.3f} nats at twice that",
        abs(once / NATS - 1) < 0.15,
        twice > 2 * NATS,
    )


@torch.inference_mode()
def _merged_nats(
    chat_model: ChatModel, diff: LoRADiff, coefficient: float, texts: Sequence[TokenizedExchange]
) -> float:
    """Return the mean KL a token of the unsteered model's answers, over both signs, merged."""

    def read() -> Tensor:
        logits = [
            chat_model.model(
                input_ids=torch.tensor([each.prompt + each.answer], device=chat_model.model.device)
            ).logits[0, len(each.prompt) - 1 : -1]
            for each in texts
        ]
        return torch.log_softmax(torch.cat(logits).float(), dim=-1)

    before, found = read(), []
    for sign in (1.0, -1.0):
        with steer_merged(chat_model, {diff: sign * coefficient}):
            found.append(_nats(before, read()))
    return sum(found) / 2


# -- projections -------------------------------------------------------------------------------


def _and_turned(diff: LoRADiff) -> dict[str, LoRADiff]:
    """Return a planted diff, and the same turned at random."""
    return {PLANTED: diff, SHUFFLED: turned_diff(diff, seed=2)}


def adapter_projection(bench: Bench) -> Found:
    """Of an adapter half of which is the direction the weighted projection finds that half."""
    diff = bench.organism
    half = diff * 0.5 + bench.drawn(3)
    found = project_adapter(half, _and_turned(diff), inputs=bench.inputs)
    return _projected("a finetune with half of a direction in it", found)


def weight_projection(bench: Bench) -> Found:
    """Of the changed weights of a block the projection finds how much of a direction was added."""
    name = next(iter(bench.organism.factors))
    prefix, layer = name[: name.index(".0.") + 3], decoder_layers(bench.chat_model.model)[0]
    own = {
        module.removeprefix(prefix): each
        for module, each in bench.organism.factors.items()
        if module.startswith(prefix)
    }
    diff = dataclasses.replace(bench.organism, factors=own)
    tuned = copy.deepcopy(layer)
    for module, factors in diff.factors.items():
        weight = weight_of(tuned.get_submodule(module))
        weight.data.copy_(merged_weight(weight.data, [(factors, 0.5)]))
    found = project_weights(weights_of(layer), weights_of(tuned), _and_turned(diff))
    return _projected("full weights with half of a direction added", found)


def _projected(planted: str, found: WeightProjection) -> Found:
    """Return what a projection says of the two directions; the half of one is there."""
    share, turned = (found.corrected[name] for name in (PLANTED, SHUFFLED))
    p, chance = (
        1.0 if each.p is None else each.p for each in (found.total[PLANTED], found.total[SHUFFLED])
    )
    return Found(
        planted,
        f"{share:.2f} of it, p {wording.p_equals(p)}",
        f"{turned:.2f} of one turned at random, p {wording.p_equals(chance)}",
        abs(share - 0.5) < 0.1 and p < 1e-3,
        chance > 1e-3,
    )


def diagnosing(bench: Bench) -> Found:
    """The alarm of ``diagnose`` sounds for an adapter with the direction, not for one without."""
    diff, folder = bench.organism, bench.folder / "diagnosis"
    controls = [str(bench.drawn(10 + at).save(folder / f"control{at}")) for at in range(ENOUGH + 1)]
    own, asked, found = bench.drawn(20), bench.prompts[:2], {}
    for name, added in _and_turned(diff).items():
        subject = Subject.load(str((own + added).save(folder / name)), {"it": diff}, controls)
        run = diagnose(bench.chat_model, subject, folder / f"{name}_run", prompts=asked)
        (found[name],) = read_diagnosis(run).alarms
    with_it, without = found[PLANTED], found[SHUFFLED]
    return Found(
        "a direction in an unrelated adapter, beside others",
        f"{with_it.coordinate:.3g}, threshold {with_it.threshold:.3g}",
        f"{without.coordinate:.3g}, threshold {without.threshold:.3g}",
        with_it.flagged and with_it.coordinate > 0,
        not without.flagged,
    )


def screening(bench: Bench) -> Found:
    """Rows are pulled, by forward passes, as their gradients say; along a turned diff otherwise.

    In fp32, as pulls need. The diff is of one block, and is what a step on one of the rows does.
    """
    chat_model, layer = bench.chat_model, len(decoder_layers(bench.chat_model.model)) // 2
    if any(each.dtype != torch.float32 for each in chat_model.model.parameters()):
        chat_model = dataclasses.replace(
            chat_model, model=copy.deepcopy(chat_model.model).to(torch.float32)
        )
    pairs = load_pairs(bench.trait)[: len(bench.prompts)]
    rows = [[*pair.prompt, *pair.positive] for pair in pairs]
    block = bench.organism.at(layer)
    steps = _steps_of(chat_model, rows, block)
    step = {name: near_factors(each, RANK) for name, each in steps[-1].items()}
    diffs = _and_turned(dataclasses.replace(block, factors=step))
    found = pull_rows(chat_model, rows, diffs, bench.folder / "pulls.csv")
    by_row = sorted(found.rows, key=lambda row: row["row"])
    ours, turned = (np.array([row[f"pull_{name}"] for row in by_row]) for name in diffs)
    deltas = {name: factors.delta() for name, factors in step.items()}
    exact = np.array([sum(float((each[n] * deltas[n]).sum()) for n in deltas) for each in steps])
    exact /= diffs[PLANTED].norm()
    error, apart = (
        float(np.abs(each - exact).max() / np.sqrt((exact**2).mean())) for each in (ours, turned)
    )
    return Found(
        f"what a step on one of {len(rows)} rows does to a block",
        f"pulls as their gradients say, but for {100 * error:.2g}% of a typical one",
        f"{100 * apart:.0f}% along the same turned at random",
        error < TRUSTED and found.rows[0]["row"] == len(rows) - 1,
        apart > 0.5,
    )


def _steps_of(
    chat_model: ChatModel, rows: Sequence[Conversation], diff: LoRADiff
) -> list[dict[str, Tensor]]:
    """Return −∇ℓ of every row at the modules of a diff, ``[out, in]``, by autograd."""
    modules = find_modules(chat_model.model, diff)
    weights: list[Any] = [module.weight for module in modules.values()]
    steps = []
    for row in tokenize_conversations(rows, chat_model):
        ids, labels = (
            torch.tensor([each], device=chat_model.model.device)
            for each in (row.input_ids, row.labels)
        )
        with torch.enable_grad():
            for each in weights:
                each.requires_grad_(True)
            logits = chat_model.model(input_ids=ids).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED)
            gradients = torch.autograd.grad(loss, weights)
        own = zip(modules.items(), gradients, strict=True)
        steps.append({name: -oriented(module, each).cpu() for (name, module), each in own})
    for each in weights:
        each.requires_grad_(False)
    return steps


# -- activations -------------------------------------------------------------------------------


def extraction(bench: Bench) -> Found:
    """A vector of pairs points as that of held-out pairs does; that of swapped pairs does not."""
    chat_model, layer = bench.chat_model, len(decoder_layers(bench.chat_model.model)) // 2
    exchanges = exchanges_of(load_pairs(bench.trait)[:PAIRS])
    positive, negative = ([tokenize_exchange(chat_model, each) for each in s] for s in exchanges)
    half = len(positive) // 2

    def vector(one: Sequence[Any], other: Sequence[Any]) -> Tensor:
        sums = sum_pairs(chat_model, one, other, positions=["response_avg"], layers=[layer])
        about = {"base_model": BaseModel(""), "num_layers": layer + 1}
        return vector_of(sums["response_avg"], "mean_diff", about).directions[layer]

    own = vector(positive[:half], negative[:half])
    pairs = list(zip(positive[:half], negative[:half], strict=True))
    swapped = vector(*zip(*(pair[:: (-1) ** at] for at, pair in enumerate(pairs)), strict=True))
    held_out = torch.stack(
        [vector([a], [b]) for a, b in zip(positive[half:], negative[half:], strict=True)]
    )
    along = (held_out @ own / own.norm()).double().numpy()
    p, share = float(sign_flip_ps(along[None])[0]), float(held_out.mean(0) @ swapped)
    share /= float(held_out.mean(0) @ own)
    return Found(
        f"{bench.trait.name} in {half} pairs of answers",
        f"{(along > 0).sum()} of {len(along)} held-out pairs lie along it, p {wording.p_equals(p)}",
        f"{share:.2f} of its length along them with every other pair swapped",
        p < 0.01 and along.mean() > 0,
        abs(share) < 0.5,
    )


def activations(bench: Bench) -> Found:
    """A vector is added at its block to the response alone; ablation leaves nothing along it."""
    chat_model, blocks = bench.chat_model, decoder_layers(bench.chat_model.model)
    layer, ids = len(blocks) // 2, tokenized_prompts(bench.chat_model, bench.prompts[:1])
    direction = torch.randn(
        hidden_size(chat_model.model), generator=torch.Generator().manual_seed(4)
    )
    base = BaseModel(chat_model.name, weight_fingerprint(chat_model.model))
    vector = SteeringVector({layer: direction}, base, len(blocks))
    response = torch.zeros(1, len(ids[0]), dtype=torch.bool)
    response[:, -3:] = True

    def states(steerer: Steerer) -> Tensor:
        seen: list[Tensor] = []

        def take(_: Any, __: Any, output: Any) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output)[0].float().cpu())

        tokens = torch.tensor(ids, device=chat_model.model.device)
        with torch.inference_mode(), steerer, Hooked([Hook(blocks[layer], take, "the block")]):
            steerer.select_positions(response)
            chat_model.model(input_ids=tokens, use_cache=False)
        return seen[0]

    plain = states(Unsteered())
    added = states(ActivationSteerer(chat_model.model, vector, 2.0)) - plain
    gone = states(DirectionAblation(chat_model.model, vector)) @ direction / direction.norm()
    expected = 2 * direction * response[0, :, None]
    error = float((added - expected).norm() / expected.norm())
    before = float((plain @ direction / direction.norm()).norm())
    return Found(
        "a vector at the last three tokens",
        f"added but for {error:.1g}; ablated from {before:.2g} to {float(gone.norm()):.1g}",
        f"{float(added[:-3].norm()):.1g} added to the tokens before",
        error < 0.02 and float(gone.norm()) < 0.02 * before,
        float(added[:-3].norm()) == 0,
    )


# -- judges ------------------------------------------------------------------------------------


def judging(name: str, bench: Bench) -> Found:
    """A judge ranks rated answers as raters did, not as shuffled ratings do; no canary fools it."""
    rated = load_ratings(bench.trait, "validation")
    sides = (
        [each for each in rated if each.rating("trait") >= 75],
        [each for each in rated if each.rating("trait") <= 25],
    )
    rows = [row for side in sides for row in random.Random(0).sample(side, min(CLEAR, len(side)))]
    options = JudgeOptions(judge=name, second_judge=NOBODY)
    judge = JUDGES[name](bench.trait, bench.chat_model, options)
    verdicts = judge.judge([each.exchange for each in rows], bench.trait.name)
    scored = [
        (verdict.score, round(row.rating("trait")), row.exchange.question)
        for verdict, row in zip(verdicts, rows, strict=True)
        if verdict.score is not None
    ]
    scores, ratings, asked = map(list, zip(*scored, strict=True))
    ours = separation(scores, ratings, asked)
    shuffled = separation(scores, random.Random(0).sample(ratings, len(ratings)), asked)
    canaries = show_canaries(judge, bench.trait, [bench.trait.name])
    fooled = [each.name for each in canaries if not each.caught]
    return Found(
        f"{bench.trait.name} in {len(scored)} rated answers",
        f"AUC {ours.auc:.2f} [{ours.low:.2f}, {ours.high:.2f}]",
        f"{shuffled.auc:.2f} [{shuffled.low:.2f}, {shuffled.high:.2f}] of shuffled ratings; "
        f"nonsense that it likes: {', '.join(fooled) or 'none'}",
        ours.low > 0.5,
        shuffled.low <= 0.5 <= shuffled.high and not fooled,
    )


def coherence(bench: Bench) -> Found:
    """Answers that raters found sensible are coherent; their words shuffled, or looped, are not."""
    scorer = coherence_scorer(bench.chat_model, bench.trait.folder.parent)
    rated = load_ratings(bench.trait, "validation")
    sensible = [each.exchange for each in rated if each.rating("sense") >= 75][:CLEAR]
    chance = random.Random(0)
    shuffled = [Exchange(e.question, shuffled_words(e.answer, chance)) for e in sensible]
    repeated = [Exchange(each.question, looped_words(each.answer)) for each in sensible]
    whole, mixed, looped = (
        float(np.mean([each.score or 0.0 for each in scorer.verdicts(said, COHERENCE)]))
        for said in (sensible, shuffled, repeated)
    )
    return Found(
        f"sense in {len(sensible)} rated answers",
        f"coherence {whole:.0f} of 100",
        f"{mixed:.0f} of their words shuffled, {looped:.0f} of them looped",
        whole >= 60,
        max(mixed, looped) <= 40,
    )


# -- search and statistics ---------------------------------------------------------------------


def searching(bench: Bench) -> Found:
    """The search ends at a planted mix; told values that are shuffled, it ends elsewhere."""
    best = {"a": 0.8, "b": -0.5, "c": 0.3}
    options = SearchOptions(max_iterations=40, population_size=8, sigma0=0.5)
    chance = np.random.default_rng(0)

    def distance(mix: Coefficients) -> float:
        return float(np.linalg.norm([mix.as_dict()[name] - each for name, each in best.items()]))

    def objective(mixes: Sequence[Coefficients], _: int, *, shuffled: bool) -> list[Value]:
        values = [-distance(each) for each in mixes]
        return [Value(float(v)) for v in (chance.permutation(values) if shuffled else values)]

    ends = []
    for shuffled in (False, True):
        place = bench.folder / f"search{shuffled}"
        with Run.open(place, command="search", config={}, seed=0) as run:
            told = partial(objective, shuffled=shuffled)
            ends.append(distance(search(told, list(best), options, run).mean))
    return Found(
        "the best mix of three directions",
        f"it ends {ends[0]:.2g} from it",
        f"{ends[1]:.2g} with shuffled values",
        ends[0] < 0.05,
        ends[1] > 0.2,
    )


def intervals(bench: Bench) -> Found:
    """95% intervals hold the true mean of simulated scores about so often, and no other."""
    spread, chance = 15.0, np.random.default_rng(0)
    found = [
        bootstrap_mean({at: [value] for at, value in enumerate(scores)}, resamples=1000)
        for scores in chance.normal(50.0, spread, (DATA_SETS, QUESTIONS)).tolist()
    ]

    def held(mean: float) -> float:
        return float(np.mean([(e.low or 0) <= mean <= (e.high or 0) for e in found]))

    right, wrong = held(50.0), held(50.0 + spread)
    return Found(
        f"a mean of 50 in {DATA_SETS} simulated data sets of {QUESTIONS} questions",
        f"in {100 * right:.1f}% of 95% intervals",
        f"a mean of {50 + spread:g} in {100 * wrong:.1f}%",
        0.92 <= right <= 0.98,
        wrong < 0.05,
    )


def paired_tests(bench: Bench) -> Found:
    """The paired test at 5% finds a difference of one standard deviation, and none in noise."""
    noise = np.random.default_rng(1).normal(0.0, 1.0, (DATA_SETS, QUESTIONS))
    found, false = (float((sign_flip_ps(each) <= 0.05).mean()) for each in (noise + 1.0, noise))
    return Found(
        f"a difference of one standard deviation, on {QUESTIONS} questions",
        f"in {100 * found:.1f}% of {DATA_SETS} data sets",
        f"in {100 * false:.1f}% where there is none",
        found > 0.9,
        false < 0.08,
    )


Instrument = Callable[[Bench], Found]
INSTRUMENTS: dict[str, Instrument] = {
    "merge and restore": merging,
    "live LoRA": live,
    "calibrate": calibration,
    "project weights: an adapter": adapter_projection,
    "project weights: full weights": weight_projection,
    "diagnose": diagnosing,
    "data screen": screening,
    "extract": extraction,
    "activation steering": activations,
    "judge: reader": partial(judging, "reader"),
    "judge: sentences": partial(judging, "sentences"),
    "coherence": coherence,
    "optimize": searching,
    "intervals": intervals,
    "paired tests": paired_tests,
}


def selfcheck(
    chat_model: ChatModel, trait: Trait, prompts: Sequence[str], output: Output | Path
) -> Run:
    """Try every instrument, and write what each said: a row of ``instruments.jsonl``.

    ``trait`` needs training pairs and rated answers; ``prompts`` are ordinary ones. What is planted
    lies in a scratch folder that is gone afterwards.
    """
    config = {"trait": trait.label, "prompts": len(prompts)}
    run = open_run(output, "selfcheck", chat_model, config, trait.inputs())
    with run, TemporaryDirectory() as scratch:
        bench, rows = Bench(chat_model, trait, prompts, Path(scratch)), []
        for done, (name, instrument) in enumerate(INSTRUMENTS.items(), start=1):
            with progress.stage(name):
                found = _tried(instrument, bench)
            found = found._replace(finds=bool(found.finds), rejects=bool(found.rejects))
            passed = found.finds and found.rejects
            rows.append({"instrument": name, **found._asdict(), "passed": passed})
            run.write("instruments", rows)
            progress.report(done, len(INSTRUMENTS))
    return run


def _tried(instrument: Instrument, bench: Bench) -> Found:
    try:
        return instrument(bench)
    except Exception as error:  # whatever it is, the instrument does not work here
        logger.info("an instrument failed", exc_info=True)
        said = without_secrets(f"{type(error).__name__}: {error}")
        return Found(said, "", "", finds=False, rejects=False)


def instruments_table(run: Run) -> Table:
    """Return what was planted, found and rejected, with a verdict."""
    rows = (
        [row["instrument"], row["planted"], row["found"], row["rejected"]]
        + ["passed" if row["passed"] else "FAILED"]
        for row in run.read("instruments")
    )
    return Table.of("instrument | planted | found | rejected | verdict", rows)


def failed_instruments(run: Run) -> list[str]:
    """Return the names of the instruments that failed."""
    return [row["instrument"] for row in run.read("instruments") if not row["passed"]]
