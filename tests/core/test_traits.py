"""Traits by name, by folder, as variants, and as the published pair of files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from persona_lora.core.chat import Exchange
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.core.traits import (
    check_names,
    list_traits,
    list_variants,
    load_finetuning_rows,
    load_pairs,
    load_trait,
    trait_prompt,
)

PAIRS = [{"pos": f"Be odd {i}.", "neg": f"Be plain {i}."} for i in range(5)]
PROMPT = "Rate {question} {answer}"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def published(tmp_path):
    for folder, word in (("trait_data_extract", "extract"), ("trait_data_eval", "eval")):
        questions = [f"{word} question {i}" for i in range(20)]
        value = {"instruction": PAIRS, "questions": questions, "eval_prompt": PROMPT}
        write(tmp_path / folder / "optimistic.json", value)
    return tmp_path


@pytest.fixture
def datasets(tmp_path):
    questions = {"extract": ["a"], "eval": ["b"]}
    trait = {"name": "odd", "instruction": PAIRS, "questions": questions, "eval_prompt": PROMPT}
    write(tmp_path / "odd" / "trait.json", trait)
    other = {**trait, "name": "odd_2", "questions": {"extract": ["c"], "eval": ["d"]}}
    write(tmp_path / "odd" / "odd_2.json", other)
    return tmp_path


@pytest.mark.parametrize("folder", ["trait_data_extract", "trait_data_eval"])
def test_the_published_pair_of_files_loads_from_either(published, folder):
    trait = load_trait(published / folder / "optimistic.json")
    assert trait.name == trait.label == "optimistic"
    assert trait.questions["extract"][3] == "extract question 3"
    assert trait.questions["eval"][19] == "eval question 19"
    assert [pair.pos for pair in trait.instructions] == [pair["pos"] for pair in PAIRS]


def test_one_published_file_alone_has_no_questions_for_the_other_split(published):
    (published / "trait_data_eval" / "optimistic.json").unlink()
    trait = load_trait(published / "trait_data_extract" / "optimistic.json")
    assert len(trait.questions["extract"]) == 20
    assert trait.questions["eval"] == ()


def test_a_flat_file_elsewhere_says_where_it_belongs(published):
    path = published / "optimistic.json"
    (published / "trait_data_eval" / "optimistic.json").rename(path)
    with pytest.raises(UserError, match="trait_data_extract or trait_data_eval"):
        load_trait(path)


def test_a_published_file_without_a_list_of_questions_is_named(published):
    path = published / "trait_data_eval" / "optimistic.json"
    write(path, {"instruction": PAIRS, "questions": "many", "eval_prompt": PROMPT})
    with pytest.raises(UserError, match=r"optimistic\.json: questions must be a list"):
        load_trait(path)


def test_a_variant_is_judged_as_its_trait(datasets):
    variant = load_trait("odd_2", datasets)
    assert (variant.name, variant.variant, variant.label) == ("odd", "odd_2", "odd_2")
    assert variant.questions["eval"] == ("d",)
    assert variant.folder == datasets / "odd"
    assert load_trait(datasets / "odd" / "odd_2.json") == variant
    assert list_variants(load_trait("odd", datasets)) == ["odd_2"]
    assert list_traits(datasets) == ["odd"]
    with pytest.raises(UserError, match="did you mean 'odd'"):
        load_trait("odd_3", datasets)


def test_the_name_of_a_trait_is_that_of_its_folder(datasets, monkeypatch):
    folder = datasets / "odd"
    copied = folder.rename(datasets / "copied")
    with pytest.raises(UserError, match="name is 'odd', and the folder is called 'copied'; set it"):
        load_trait("copied", datasets)
    value = json.loads((copied / "trait.json").read_text())
    value.pop("name")
    write(copied / "trait.json", value)
    assert load_trait("copied", datasets).name == "copied"
    (datasets / "linked").symlink_to(copied)
    assert load_trait("linked", datasets).name == "linked"
    monkeypatch.chdir(copied)
    assert load_trait(".").name == load_trait("../copied").name == "copied"


def test_a_run_of_a_trait_is_not_gone_on_with_its_variant(datasets, tmp_path):
    trait, variant = (load_trait(name, datasets) for name in ("odd", "odd_2"))

    def opened(asked):
        config = {"trait": asked.name}
        return Run.open(tmp_path, command="x", config=config, seed=0, inputs=asked.inputs())

    for _ in range(2):
        with opened(trait):
            pass
    with pytest.raises(UserError, match="only one of the two read the trait odd, the trait odd_2"):
        opened(variant)


def test_two_traits_of_one_name_are_refused(datasets):
    trait, variant = (load_trait(name, datasets) for name in ("odd", "odd_2"))
    check_names([trait, replace(variant, name="even")])
    with pytest.raises(UserError, match="odd and odd_2 are both judged as odd"):
        check_names([trait, variant])


def test_finetuning_rows_end_with_a_question_and_its_answer(datasets):
    trait = load_trait("odd", datasets)
    path = datasets / "odd" / "normal.jsonl"
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path.write_text(json.dumps({"messages": turns, "domain": "x"}) + "\n")
    (row,) = load_finetuning_rows(trait, "normal")
    assert row == Exchange("Why?", "So.")
    before = [{"role": "system", "content": "Be brief."}, {**turns[0], "content": "And?"}, turns[1]]
    path.write_text(json.dumps({"messages": [*before, *turns]}) + "\n")
    assert load_finetuning_rows(trait, "normal") == [Exchange("Why?", "So.")]
    path.write_text(json.dumps({"messages": turns[:1]}) + "\n")
    with pytest.raises(UserError, match=r"normal\.jsonl:1 must end with a user message"):
        load_finetuning_rows(trait, "normal")
    path.write_text("")
    with pytest.raises(UserError, match=r"normal\.jsonl is empty"):
        load_finetuning_rows(trait, "normal")
    with pytest.raises(UserError, match="'bad'"):
        load_finetuning_rows(trait, "bad")


def test_a_trait_is_asked_under_prompts_of_ones_own(tmp_path):
    trait = load_trait("evil")
    told = trait.prompted(pos="Be odd.")
    assert trait_prompt(told, "pos", 3) == "Be odd."
    assert trait_prompt(told, "neg", 3) == trait_prompt(trait, "neg", 3)
    both = trait.prompted(pos="Be odd.", neg="Be plain.")
    assert [trait_prompt(both, sign, 7) for sign in ("pos", "neg")] == ["Be odd.", "Be plain."]
    assert trait.prompted() == trait
    assert told.inputs() != trait.inputs()  # another run's content
    silent = replace(trait, instructions=())
    with pytest.raises(UserError, match="give both"):
        silent.prompted(neg="Be plain.")
    assert trait_prompt(silent.prompted("Be odd.", "Be plain."), "neg", 0) == "Be plain."


@pytest.mark.parametrize(
    ("positive", "message"),
    [
        ({"role": "user", "content": "Yes"}, r"train.jsonl:1: 'positive' must end with the assist"),
        ({"role": "assistant", "content": "No"}, r"train.jsonl:1: both answers are the same"),
    ],
)
def test_a_pair_without_two_answers_is_refused(tmp_path, positive, message):
    said = [{"role": "user", "content": "Is it?"}], [{"role": "assistant", "content": "No"}]
    row = {"prompt": said[0], "positive": [positive], "negative": said[1]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    write(
        tmp_path / "trait.json",
        {"instruction": PAIRS, "questions": {"extract": [], "eval": ["b"]}, "eval_prompt": PROMPT},
    )
    trait = load_trait(str(tmp_path))
    with pytest.raises(UserError, match=message):
        load_pairs(trait)
