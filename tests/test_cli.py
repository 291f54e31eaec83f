"""The command line: exit status 2 and one clear line for every mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from persona_lora import cli
from persona_lora.cli.shared_options import judge_settings, judging_of
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.core.options import JudgeChoice
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.core.traits import load_trait
from persona_lora.judges import choice
from persona_lora.models.loading import load_chat_model
from persona_lora.models.structure import weight_fingerprint
from persona_lora.projections.inputs import kept_inputs, load_ordinary_prompts
from tests.conftest import tiny_llama
from tests.scenes import LetterJudge, ParityJudge, assert_fails, evaluation


@pytest.fixture
def diff_folder(model, make_diff, tmp_path):
    return make_diff(model, fingerprint=weight_fingerprint(model)).save(tmp_path / "diff")


def test_an_unknown_trait_names_the_nearest(run, model_folder):
    words = [*evaluation(model_folder)]
    words[words.index("sycophancy")] = "sycofancy"
    assert_fails(run(*words), "'sycofancy'", "did you mean 'sycophancy'")


def test_a_missing_or_corrupt_diff_is_named(run, model_folder, diff_folder, tmp_path):
    assert_fails(run(*evaluation(model_folder, "--diff", "nowhere")), "nowhere", "does not exist")
    weights = diff_folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_fails(run(*evaluation(model_folder, "--diff", diff_folder)), "truncated")
    assert not (tmp_path / "out").exists()


def test_nan_in_a_diff_is_named(run, model_folder, diff_folder):
    weights = diff_folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    assert_fails(run(*evaluation(model_folder, "--diff", diff_folder)), "NaN")


def test_a_diff_of_another_base_is_refused(run, model_folder, diff_folder, tmp_path):
    path = diff_folder / "diff.json"
    record = json.loads(path.read_text())
    record["base_model"]["fingerprint"] = "0" * 32
    path.write_text(json.dumps(record))
    assert_fails(run(*evaluation(model_folder, "--diff", diff_folder)), "--allow-other-base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["live", "merged"])
def test_a_coefficient_that_is_not_finite_is_refused(run, model_folder, diff_folder, mode):
    words = ("--diff", diff_folder, "--coefficient", "nan", "--mode", mode)
    assert_fails(run(*evaluation(model_folder, *words)), "finite", "nan")


def test_a_judge_without_a_key_says_what_to_set_before_anything_is_generated(
    run, model_folder, tmp_path
):
    assert_fails(run(*evaluation(model_folder, "--judge", "openai")), "OPENAI_API_KEY")
    assert not (tmp_path / "out").exists()


def test_an_unknown_judge_names_the_known_ones(run, model_folder, tmp_path):
    assert_fails(run(*evaluation(model_folder, "--judge", "embeding")), "'embedding'")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused(run, model_folder, tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    assert_fails(run(*evaluation(model_folder)), "cannot write", "out")


def test_malformed_jsonl_names_file_and_line(run, tmp_path):
    folder = tmp_path / "sycophancy"
    folder.mkdir()
    source = load_trait("sycophancy").folder
    for name in ("trait.json", "judge_eval.jsonl"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "train.jsonl").write_text('{"prompt": [\n')
    assert_fails(run("data", "check", folder), "train.jsonl:1")
    (folder / "train.jsonl").write_text("")
    assert_fails(run("data", "check", folder), "is empty")


def test_traits_to_check_are_known_before_any_is_checked(run, monkeypatch):
    def too_early():
        raise AssertionError("the embedder is loaded")

    monkeypatch.setattr("persona_lora.models.embeddings.SentenceEmbedder", too_early)
    for names in (("nope",), ("sycophancy", "nope"), ("sycophancy,nope",)):
        assert_fails(run("data", "check", *names), "no trait 'nope'")


def test_a_model_that_is_nowhere_is_explained(run):
    assert_fails(run(*evaluation("nobody/nothing")), "nobody/nothing", "packaged model")


def test_a_report_about_no_run_is_refused(run, tmp_path):
    assert_fails(run("report", tmp_path), "run")
    assert not (tmp_path / "results").exists()


def test_unequal_numbers_of_diffs_and_coefficients_are_refused(run, model_folder, diff_folder):
    words = ("--diff", diff_folder, "--coefficient", 1, "--coefficient", 2)
    assert_fails(run(*evaluation(model_folder, *words)), "1 --diff and 2 --coefficient")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--coefficients", "a"), "a number"),
        (("--coefficients", "-1 0"), "with commas: -1,0"),
        (("--coefficients", "inf"), "finite"),
        (("--split", "test"), "extract, eval, ood"),
        (("--batch-size", "many"), "whole number"),
        (("--judge-mode", "letters"), "logprobs or number"),
    ],
)
def test_senseless_option_values_are_refused(run, diff_folder, words, expected):
    assert_fails(run("sweep", "--trait", "evil", "--diff", diff_folder, *words), expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("sweep", "--strength", "2"), "--strength"),
        (("sweep",), "--trait"),
        (("steer",), "steer"),
        (("sweep", "--trait", "evil", "--diff", "x", "--seed", "abc"), "--seed"),
    ],
)
def test_mistaken_options_are_one_line(run, words, expected):
    assert_fails(run(*words), expected)


def test_what_processes_do_not_share_out_is_refused_to_several(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = run("evaluate", "--trait", "evil", "--output", "x.csv")
    assert status == 2
    assert "2 processes were launched, and each would do all of evaluate" in error
    status, _, error = run("optimize", "--persona-id", "nobody", "--pareto")
    assert status == 2
    assert "--pareto needs two --targets" in error


def test_no_command_at_all_shows_the_help(run):
    status, out, error = run()
    assert status == 2
    assert "Usage" in out + error
    assert "error:" not in error


def test_an_interrupt_says_how_to_go_on(run, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("persona_lora.cli.program.app", interrupted)
    status, _, error = run("sweep")
    assert status == 130
    assert "go on" in error


def test_train_forwards_its_arguments_to_the_one_parser(run, monkeypatch):
    seen = []
    monkeypatch.setattr("persona_lora.training.contrastive.main", seen.append)
    assert run("train", "--config", "a.yaml", "--lora_r", "4")[0] == 0
    assert seen == [["--config", "a.yaml", "--lora_r", "4"]]


def test_mistaken_training_flags_are_one_line(run):
    assert_fails(run("train"), "--trait")
    assert_fails(run("train", "--trait", "evil", "--learning_rat", "1"), "learning_rat")


def test_the_key_is_not_recorded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    options = judging_of(JudgeChoice(judge="openai"))
    assert options.environ["OPENAI_API_KEY"] == "secret-key"
    assert "secret-key" not in json.dumps(judge_settings(options))


ENDPOINT = {
    "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "JUDGE_MODEL": "another"
}  # fmt: skip


@pytest.mark.parametrize("judge", [*choice.JUDGES, "local,rules", "embedding,openai"])
@pytest.mark.parametrize("second", ["none", None, "embedding", "local", "openai"])
def test_an_endpoint_is_recorded_of_the_judges_that_ask_one(judge, second):
    told, asked = {}, "openai" in (*judge.split(","), second)
    for name in (None, *ENDPOINT):
        environ = {} if name is None else {name: ENDPOINT[name]}
        options = choice.JudgeOptions(judge, second_judge=second, environ=environ)
        told[name] = judge_settings(options), choice.judge_inputs(options)
    changed = {name for name in ENDPOINT if told[name] != told[None]}
    assert changed == ({"OPENAI_BASE_URL", "JUDGE_MODEL"} if asked else set())
    if "openai" not in judge:
        assert {told[name][1]["the judge"] for name in told} == {told[None][1]["the judge"]}


def test_a_run_goes_on_where_an_endpoint_is_set_meanwhile(run, make_world, tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    words = (
        *("evaluate", "--trait", "cheer", "--datasets-dir", "datasets", "--model", "model"),
        *("--dtype", "float32", "--max-new-tokens", 3, "--judge", "embedding"),
        *("--second-judge", "none", "--output", "out/a.csv"),
    )
    assert run(*words)[0] == 0
    for name, value in ENDPOINT.items():
        monkeypatch.setenv(name, value)
        status, _, said = run(*words)
        assert status == 0, said
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_text("JUDGE_MODEL=another\n")
    status, _, said = run(*words)
    assert status == 0, said


def test_the_module_and_the_script_are_one_command():
    environment = {**os.environ, "COLUMNS": "200"}
    answer = subprocess.run(
        [sys.executable, "-m", "persona_lora", "evaluate", "--trait", "x"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert answer.returncode == 2
    assert "--output" in answer.stderr


def test_typers_exit_status_passes_through(monkeypatch):
    def stop(**_):
        raise typer.Exit(3)

    monkeypatch.setattr("persona_lora.cli.program.app", stop)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 3


def test_user_errors_are_one_line(run, monkeypatch):
    def fail(**_):
        raise UserError("a mistake\nover two lines")

    monkeypatch.setattr("persona_lora.cli.program.app", fail)
    assert_fails(run("sweep"), "a mistake over two lines")


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (("export", "--mix", "{diff}=1", "--output", "out"), "out/adapter_config.json"),
        (("export", "--mix", "{diff}=1", "--format", "merged", "--output", "out"), "out"),
        (("export", "--mix", "{diff}=1", "--format", "gguf-lora", "--output", "o.gguf"), "o.gguf"),
        (("basis", "--diffs", "{diff}", "--output", "out"), "out"),
        (("gallery", "make", "--diffs", "{diff}", "--output", "out"), "out"),
        (("vectors", "convert", "v.pt", "w.pt", "--form", "published"), "w.pt"),
    ],
)
def test_what_is_there_is_replaced_only_where_that_is_asked_for(
    run, diff_folder, tmp_path, words, made
):
    words = [word.format(diff=diff_folder) for word in words]
    path = tmp_path / made
    path.parent.mkdir(exist_ok=True)
    if path.suffix:
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    status, _, error = run(*words)
    assert status == 2
    assert f"{made.partition('/')[0]} exists; choose another output or pass --overwrite" in error
    assert "exists" not in run(*words, "--overwrite")[2]


@pytest.mark.parametrize("form", ["merged", "gguf-lora", "gguf"])
def test_a_diff_is_exported_into_its_own_base_alone(run, diff_folder, tmp_path, caplog, form):
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "converter.py").write_text("import sys; open(sys.argv[3], 'w').write('x')")
    words = ("export", "--mix", f"{diff_folder}=1", "--model", "other", "--format", form)
    words += ("--output", "out.gguf", *("--converter", "converter.py") * (form == "gguf"))
    assert_fails(run(*words), "belongs to", "--allow-other-base")
    assert not (tmp_path / "out.gguf").exists()
    status, _, error = run(*words, "--allow-other-base")
    assert status == 0, error


def test_weights_that_cannot_be_told_are_exported_into_with_a_warning(
    run, diff_folder, tmp_path, caplog
):
    tiny_llama().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    words = ("--mix", f"{diff_folder}=1", "--model", "other", "--format", "gguf-lora")
    status, _, error = run("export", *words, "--output", "out.gguf")
    assert status == 0, error
    assert "the files of other do not tell" in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        ("export", "--mix", "zero=1", "--output", "out"),
        ("export", "--mix", "{diff}=1,zero=1", "--output", "out"),
        ("project", "weights", "--finetuned-model", "{diff}", "--diffs", "zero"),
        ("diagnose", "{diff}", "--diffs", "{diff},zero", "--output", "out"),
        ("basis", "--diffs", "zero", "--output", "out"),
        ("gallery", "make", "--diffs", "zero", "--output", "out"),
        ("sweep", "--trait", "evil", "--diff", "zero"),
        ("evaluate", "--trait", "evil", "--diff", "zero", "--output", "out/x.csv"),
        ("evaluate", "--trait", "evil", "--vector", "zero.safetensors", "--layers", "0",
         "--output", "out/x.csv"),
        ("compare", "--trait", "evil", "--diff", "zero", "--activation-vector", "zero.safetensors"),
    ],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_a_direction_of_zero_is_no_direction(run, diff_folder, tmp_path, words):
    (LoRADiff.load(diff_folder) * 0.0).save(tmp_path / "zero")
    base = LoRADiff.load(diff_folder).base_model
    vector = SteeringVector({0: torch.zeros(32), 1: torch.ones(32)}, base, 2)
    vector.save(tmp_path / "zero.safetensors")
    said = run(*(word.format(diff=diff_folder) for word in words))
    assert_fails(said, "zero", "has a length of 0: it does nothing")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_cut_by_what_its_base_s_outputs_notice_unless_plain_is_said(
    run, model_folder, diff_folder, tmp_path
):
    words = ("export", "--mix", f"{diff_folder}=1", "--rank", 1)
    status, said, error = run(*words, "--model", model_folder, "--output", "weighed")
    assert status == 0, error
    assert "of the squared effect on the prompts" in said
    status, said, error = run(*words, "--plain", "--output", "plain")  # knows no model
    assert status == 0, error
    assert "of the squared Frobenius norm" in said
    diff, inputs = (
        LoRADiff.load(diff_folder),
        kept_inputs(load_chat_model(str(model_folder)), load_ordinary_prompts()),
    )
    expected = {"weighed": inputs.compress(diff, rank=1), "plain": diff.compress(rank=1)}
    for name, cut in expected.items():
        found = LoRADiff.load(tmp_path / name)
        assert (found - cut.diff).norm() == pytest.approx(0, abs=1e-5 * diff.norm())
    assert (LoRADiff.load(tmp_path / "plain") - LoRADiff.load(tmp_path / "weighed")).norm() > 0.0


def test_a_rank_is_cut_in_one_way_before_anything_is_loaded(run, diff_folder):
    both = ("--rank", 2, "--energy", 0.9, "--output", "out")
    for words in (("export", "--mix", "none=1"), ("basis", "--diffs", "none")):
        assert_fails(run(*words, *both), "--rank 2 and --energy 0.9 cut in two ways")
    one = ("export", "--mix", "none=1", "--output", "out", "--rank", 0)
    assert_fails(run(*one), "rank must be at least 1")


def test_a_mix_of_nothing_is_not_exported(run, diff_folder, tmp_path):
    words = ("export", "--mix", f"{diff_folder}=0", "--output", "out")
    assert_fails(run(*words), "every coefficient of the mix", "is 0")
    assert not (tmp_path / "out").exists()


def test_an_export_shows_a_bar(run, model_folder, diff_folder):
    words = ("--mix", f"{diff_folder}=1", "--format", "merged", "--model", model_folder)
    status, _, error = run("export", *words, "--output", "merged")
    assert status == 0, error
    assert re.findall(r"(\w+) +━+ (\d+/\d+)", error) == [("shards", "1/1")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--adapter", "adapter"), "does not fit"),
        (("--model", "model"), "holds no tokenizer"),
        (("--max-new-tokens", 10**9), "2048 positions"),
        (("--vector", "vector.safetensors", "--layers", "0-1000000000"), "layers 0–1"),
        (("--vector", "vector.safetensors", "--layers", "1-0"), "out of range"),
        (("--judge", "embedding,embedding"), "names a judge twice"),
        (("--seed", 2**32), "at most 4294967295"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_asked(
    run, make_world, make_adapter, tmp_path, given, said
):
    world = make_world(tmp_path)
    if said == "does not fit":
        wide = LlamaConfig(**{**tiny_llama().config.to_dict(), "hidden_size": 48})
        make_adapter(world / "adapter", LlamaForCausalLM(wide), seed=1)
    if said == "holds no tokenizer":
        for each in (world / "model").glob("token*"):
            each.unlink()
    words = (*evaluation("model", "--datasets-dir", "datasets"), *given)
    words = tuple("cheer" if each == "sycophancy" else each for each in words)
    assert_fails(run(*words), said)
    assert not list((world / "out").glob("**/answers.jsonl"))


def test_too_few_pairs_are_refused_before_anything_is_asked(run, make_world, tmp_path):
    pairs = make_world(tmp_path) / "datasets/cheer/train.jsonl"
    pairs.write_text("\n".join(pairs.read_text().splitlines()[:4]) + "\n")
    words = (*evaluation("model", "--judge", "embedding"), "--datasets-dir", "datasets")
    words = tuple("cheer" if each == "sycophancy" else each for each in words)
    assert_fails(run(*words), "4 training pairs are too few")
    assert not (tmp_path / "out/x/answers.jsonl").exists()


def test_evaluate_asks_the_first_questions_and_says_which_setting_differs(
    run, make_world, tmp_path, monkeypatch
):
    world = make_world(tmp_path)
    monkeypatch.setattr(choice, "make_judge", lambda *_: ParityJudge())
    words = (*evaluation("model", "--judge", "embedding", "--second-judge", "none"),)
    words = tuple("cheer" if each == "sycophancy" else each for each in words)
    words = (*words, "--datasets-dir", "datasets", "--max-questions")
    status, _, error = run(*words, 1)
    assert status == 0, error
    assert len((world / "out/x/answers.jsonl").read_text().splitlines()) == 1
    assert_fails(run(*words, 2), "max_questions: 1, now 2")
    assert json.loads((world / "out/x/run.json").read_text())["config"]["max_questions"] == 1


def test_a_sweep_says_which_setting_of_it_differs(run, make_world, tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.setattr(choice, "make_judge", lambda *_: ParityJudge())
    words = (
        "sweep", "--trait", "cheer", "--datasets-dir", "datasets", "--model", "model", "--diff",
        "diff", "--coefficients", "1", "--dtype", "float32", "--max-new-tokens", 2, "--judge",
        "embedding", "--second-judge", "none", "--output", "out",
    )  # fmt: skip
    assert run(*words, "--no-references")[0] == 0
    assert_fails(run(*words), "only one of the two read the neutral prompts", "--overwrite")
    other = run(*words, "--no-references", "--no-divergence")
    assert_fails(other, "config.divergence: not set, now False", "--overwrite")
