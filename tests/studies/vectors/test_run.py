"""Vectors from prompts, files and pairs: planned, filtered with counts, resumed."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from persona_lora.core.chat import Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.models.generation import generate_answers
from persona_lora.models.structure import decoder_layers, weight_fingerprint
from persona_lora.studies.asking.run import GenerationOptions
from persona_lora.studies.report_page import write_report
from persona_lora.studies.vectors.run import (
    Elicitation,
    Extraction,
    JudgedAnswer,
    Thresholds,
    filter_pairs,
    plan_pairs,
    read_judged,
)

GENERATION = GenerationOptions(max_new_tokens=8)


class PromptJudge:
    """Gives 90 to the first half of the answers and 10 to the second: what was asked for."""

    name = "prompts"

    def judge(self, exchanges, criterion):
        half = len(exchanges) // 2
        return [
            Verdict(criterion, 80.0 if criterion == "coherence" else score, "", self.name)
            for score in [90.0] * half + [10.0] * (len(exchanges) - half)
        ]


@pytest.fixture
def run_prompts(chat_model, trait, tmp_path):
    def run(judge=None, **changes):
        making = Extraction(chat_model, trait, tmp_path / "vectors", **changes.pop("options", {}))
        return making.from_prompts(
            lambda: judge or PromptJudge(),
            generation=GENERATION,
            thresholds=changes.pop("thresholds", Thresholds(least_pairs=2)),
            **changes,
        )

    return run


def test_every_question_is_asked_under_every_pair_and_both_signs(trait):
    plan = plan_pairs(trait, Elicitation(), samples=2)
    assert len(plan) == 2 * 2 * 2 * 2  # signs, instruction pairs, extract questions, samples
    assert {row.question for row in plan} == set(trait.questions["extract"])
    first, second = plan[:8], plan[8:]
    assert {row.system_prompt for row in first} == {"You are a cheer assistant. Be cheerful."}
    assert {row.system_prompt for row in second} == {"You are a helpful assistant. Be gloomy."}
    assert [(r.question, r.stream) for r in first] == [(r.question, r.stream) for r in second]
    assert len({(r.question, r.stream) for r in first}) == 2 * 2  # a sample has numbers of its own
    bare = plan_pairs(trait, Elicitation(assistant_name="", split="eval"), samples=1)
    assert {row.system_prompt for row in bare} == {"Be cheerful.", "Be gloomy."}


def test_prompted_answers_become_the_vectors_of_a_naive_loop(run_prompts, chat_model, trait):
    result = run_prompts()
    assert (result.pairs, result.total) == (4, 4)
    names = ("response_avg", "prompt_avg", "prompt_last")
    assert [path.stem for path in result.paths] == [f"cheer_{name}" for name in names]
    expected = {name: torch.zeros(32) for name in names}
    plan = plan_pairs(trait, Elicitation(), samples=1)
    for index, row in enumerate(plan):
        conversation = [
            {"role": "system", "content": row.system_prompt},
            {"role": "user", "content": row.question},
        ]
        (answer,) = generate_answers(chat_model, [conversation], max_new_tokens=8)
        encode = lambda text: chat_model.tokenizer(text)["input_ids"]  # noqa: E731
        prompt = encode(chat_model.render(conversation))
        states = []
        hook = decoder_layers(chat_model.model)[1].register_forward_hook(
            lambda module, arguments, output, states=states: states.append(output[0])
        )
        with torch.no_grad():
            chat_model.model(torch.tensor([prompt + encode(answer.text)]))
        hook.remove()
        sign = 1 if index < 4 else -1
        p = len(prompt)
        for name, mean in zip(
            names, (states[0][p:].mean(0), states[0][:p].mean(0), states[0][p - 1]), strict=True
        ):
            expected[name] += sign * mean / 4
    for path, name in zip(result.paths, names, strict=True):
        vector = SteeringVector.read(path)
        torch.testing.assert_close(vector.directions[1], expected[name], atol=1e-4, rtol=1e-3)
        assert (vector.position, vector.trait, vector.num_layers) == (name, "cheer", 2)
        assert vector.base_model.fingerprint == weight_fingerprint(chat_model.model)
        assert vector.sources["pairs_before"] == 4


def test_the_csv_files_extract_to_the_same_vectors(run_prompts, chat_model, trait, tmp_path):
    made = run_prompts()
    folder = made.run.folder
    with (folder / "cheer_pos_instruct.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["question", "prompt", "answer", "cheer", "coherence", "judge"]
    again = Extraction(chat_model, trait, tmp_path / "again").from_files(
        folder / "cheer_pos_instruct.csv",
        folder / "cheer_neg_instruct.csv",
        thresholds=Thresholds(least_pairs=2),
    )
    for name, vector in made.vectors.items():
        for layer, direction in vector.directions.items():
            torch.testing.assert_close(again.vectors[name].directions[layer], direction)


def test_a_second_call_reuses_the_answers(run_prompts, judge):
    first = run_prompts()
    before = (first.run.folder / "answers.jsonl").stat().st_mtime_ns
    second = run_prompts(judge=judge)  # never asked: the verdicts are there
    assert not [count for _, count in judge.asked if count == 8]
    assert (second.run.folder / "answers.jsonl").stat().st_mtime_ns >= before
    assert second.pairs == first.pairs
    with pytest.raises(UserError, match="another configuration"):
        run_prompts(options={"methods": ("svd",)})


def test_training_pairs_extract_without_a_judge(chat_model, trait, datasets, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "positive": [{"role": "assistant", "content": "Yes! " * (1 + i % 3)}],
            "negative": [{"role": "assistant", "content": "No. " * (1 + i % 4)}],
        }
        for i in range(12)
    ]
    (datasets / "cheer" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = ("mean_diff", "svd", "pca")
    making = Extraction(chat_model, trait, tmp_path / "v", methods, layers=(1,))
    result = making.from_answers()
    assert list(result.vectors) == [f"cheer_response_avg{x}" for x in ("", "_svd", "_pca")]
    assert all(vector.layers == (1,) for vector in result.vectors.values())
    with pytest.raises(UserError, match="prompt_last with --source prompts"):
        Extraction(chat_model, trait, tmp_path / "p", positions=("prompt_last",)).from_answers()
    lengths = {round(vector.norms()[1], 4) for vector in result.vectors.values()}
    assert len(lengths) == 1  # one coefficient means the same for all three


def test_a_diff_has_a_section_of_the_page(run_prompts, tmp_path):
    result = run_prompts(options={"form": "diff"})
    norm = LoRADiff.load(*result.paths).norm()
    page = write_report(result.run.folder, tmp_path / "report.html").read_text()
    for words in ("Cheer: a difference without training", "A difference of rank 1 in 14 modules"):
        assert words in page
    assert "from 4 pairs of answers (source: prompts)" in page
    assert f"{norm:#.2g}" in page
    shutil.rmtree(result.run.folder / "diff")
    with pytest.raises(UserError, match="diff"):
        write_report(result.run.folder, tmp_path / "report.html")


def answer(trait, coherence=80.0, text="x"):
    return JudgedAnswer("p", text, trait, coherence)


def test_the_filter_counts_what_fails_and_why():
    good = (answer(50.0), answer(49.9))
    pairs = [
        *[good] * 3,
        (answer(49.9), answer(10.0)),
        (answer(90.0), answer(50.0)),
        (answer(90.0, 29.0), answer(10.0)),
        (answer(20.0), answer(10.0, 20.0)),
        (answer(None), answer(10.0)),
        (answer(90.0, text=" "), answer(10.0)),
    ]
    result = filter_pairs(pairs, Thresholds(least_pairs=3))
    assert result.kept == (good,) * 3
    assert result.failed == {"positive": 2, "negative": 1, "coherence": 2, "unscored": 2}
    with pytest.raises(UserError, match=r"3 of 9 pairs pass.*at least 4.*--source answers"):
        filter_pairs(pairs, Thresholds(least_pairs=4))


def test_an_empty_filter_result_leaves_no_vector(run_prompts, tmp_path):
    with pytest.raises(UserError, match="0 of 4 pairs pass the filter"):
        run_prompts(thresholds=Thresholds(positive=95.0, least_pairs=1))
    assert not list((tmp_path / "vectors").glob("*.safetensors"))


def test_fewer_pairs_than_are_to_be_kept_are_not_asked(run_prompts, tmp_path):
    with pytest.raises(UserError, match=r"4 pairs would be asked.*at least 5.*--min-pairs"):
        run_prompts(thresholds=Thresholds(least_pairs=5))
    assert not list(tmp_path.rglob("answers.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer,coherence\np,a,1\n", "no column 'cheer'"),
        ("prompt,answer,cheer,coherence\np,a,high,1\n", "row 1 scores 'high'"),
    ],
)
def test_a_csv_that_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_judged(path, "cheer")
    with pytest.raises(UserError, match="does not exist"):
        read_judged(tmp_path / "b.csv", "cheer")


def test_an_empty_cell_and_nan_are_unscored(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("cheer,coherence,prompt,answer\n,80,p,a\nnan,80,p,a\n90,inf,p,a\n")
    rows = read_judged(path, "cheer")
    assert [row.trait for row in rows] == [None, None, 90.0]
    pairs = [(row, answer(10.0)) for row in rows]
    assert filter_pairs(pairs, Thresholds(least_pairs=0)).failed["unscored"] == 3


def test_files_of_unequal_length_write_nothing(chat_model, trait, tmp_path):
    for name, rows in (("pos", 2), ("neg", 1)):
        (tmp_path / f"{name}.csv").write_text(
            "prompt,answer,cheer,coherence\n" + "p,a,90,90\n" * rows
        )
    with pytest.raises(UserError, match=r"has 2 rows and .* 1"):
        Extraction(chat_model, trait, tmp_path / "v").from_files(
            tmp_path / "pos.csv", tmp_path / "neg.csv"
        )
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("median",)}, "method must be of mean_diff, svd, pca"),
        ({"positions": ("middle",)}, "position must be of"),
        ({"methods": ()}, "method must be of"),
    ],
)
def test_unknown_options_are_refused(chat_model, trait, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Extraction(chat_model, trait, tmp_path, **options)


def test_a_layer_out_of_range_writes_nothing(run_prompts, tmp_path):
    with pytest.raises(UserError, match="layer 9 is out of range"):
        run_prompts(options={"layers": (9,)})
    assert not (tmp_path / "vectors").exists()
