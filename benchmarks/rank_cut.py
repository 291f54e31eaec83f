"""A rank cut by what reaches the outputs, against one by the Frobenius norm.

    persona-lora gallery get --traits formality,sycophancy --output ready
    python benchmarks/rank_cut.py ready/formality/diff ready/sycophancy/diff --coefficients 1 2

For each diff: the mean rank over modules that either way needs for a share of its own norm, and of
the cuts to one rank the share that is kept of the outputs on ordinary prompts, and KL(uncut ‖ cut)
in nats a token. That is read where the uncut diff steers, on its answers to the trait's questions,
which none of the inputs came from, beside how far the uncut diff moves the model there. All in
float32: rounding in bf16 is larger than what a cut leaves.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.traits import load_trait
from persona_lora.models.load_options import DEFAULT_MODEL
from persona_lora.models.loading import ChatModel, load_chat_model
from persona_lora.projections.inputs import ModuleInputs, kept_inputs, load_ordinary_prompts
from persona_lora.steering.bank import bank_of_diffs
from persona_lora.steering.weights import LoRASteerer
from persona_lora.studies.steering.divergence import ordinary_texts, row_divergences

SHARES = 0.9, 0.99, 0.999


def mean_rank(diff: LoRADiff) -> float:
    return statistics.fmean(factors.rank for factors in diff.factors.values())


def moved(
    chat_model: ChatModel,
    diff: LoRADiff,
    cuts: dict[str, LoRADiff],
    coefficient: float,
    questions: list[str],
) -> tuple[float, dict[str, float]]:
    """Return KL(unsteered ‖ uncut), and KL(uncut ‖ cut) of each cut, in nats a token."""
    with LoRASteerer(chat_model.model, diff, coefficient):
        texts = ordinary_texts(chat_model, questions)
        errors = bank_of_diffs({name: cut - diff for name, cut in cuts.items()})
        rows = [{name: coefficient} for name in cuts]
        left = row_divergences(chat_model, errors, rows, texts).mean(dim=1).tolist()
    whole = row_divergences(chat_model, bank_of_diffs({"d": diff}), [{"d": coefficient}], texts)
    return float(whole.mean()), dict(zip(cuts, left, strict=True))


def describe(
    path: Path, chat_model: ChatModel, inputs: ModuleInputs, options: argparse.Namespace
) -> None:
    diff = LoRADiff.load(path)
    questions = list(load_trait(diff.trait or path).questions["eval"][: options.questions])
    weighed = inputs.weigh(diff)
    for share in SHARES:
        ways = inputs.compress(diff, energy=share), diff.compress(energy=share)
        shares = [
            1 - (inputs.weigh(each.diff - diff).norm() / weighed.norm()) ** 2 for each in ways
        ]
        print(
            f"{diff.trait}, {share:.1%} of its own ‖·‖²: mean rank weighted "
            f"{mean_rank(ways[0].diff):.1f} (outputs {shares[0]:.2%}), plain "
            f"{mean_rank(ways[1].diff):.1f} (outputs {shares[1]:.2%}), of {diff.rank}"
        )
    for rank in options.ranks:
        cuts = {
            "weighted": inputs.compress(diff, rank=rank).diff,
            "plain": diff.compress(rank=rank).diff,
        }
        kept = {
            name: 1 - (inputs.weigh(cut - diff).norm() / weighed.norm()) ** 2
            for name, cut in cuts.items()
        }
        for coefficient in options.coefficients:
            whole, left = moved(chat_model, diff, cuts, coefficient, questions)
            print(
                f"{diff.trait}, rank {rank}, coefficient {coefficient:g} ({whole:.3f} nats): "
                + "; ".join(f"{n} keeps {kept[n]:.2%}, leaves {left[n]:.2e} nats" for n in cuts)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("diffs", type=Path, nargs="+")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--coefficients", type=float, nargs="+", default=[1.0])
    parser.add_argument("--questions", type=int, default=20)
    options = parser.parse_args()
    chat_model = load_chat_model(options.model, dtype="float32")
    inputs = kept_inputs(chat_model, load_ordinary_prompts())
    for path in options.diffs:
        describe(path, chat_model, inputs, options)


if __name__ == "__main__":
    main()
