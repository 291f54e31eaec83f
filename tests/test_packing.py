"""A finished run as an archive: packed, checked, run again; archives that are broken or hostile."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
import types
import zipfile
from pathlib import Path

import pytest

from persona_lora.core.archives import MANIFEST, faults_of, opened
from persona_lora.core.chat import Verdict
from persona_lora.core.errors import UserError
from persona_lora.core.runs import Run
from persona_lora.judges import choice
from persona_lora.studies.packing import compare_rows, pack_run
from persona_lora.studies.personas import bench
from tests.scenes import LetterJudge

ROOT = Path(__file__).resolve().parents[1]

ASKED = (
    *("--trait", "cheer", "--diff", "diff", "--model", "model", "--dtype", "float32"),
    *("--datasets-dir", "datasets", "--max-new-tokens", 3),
)
SWEEP = (*("sweep", "--coefficients", "-1,1", "--no-references"), *ASKED)


@pytest.fixture
def world(run, make_world, no_drawing, tmp_path, monkeypatch):
    make_world(tmp_path)
    monkeypatch.setitem(choice.JUDGES, "embedding", lambda *_: LetterJudge())
    return tmp_path


@pytest.fixture
def small(tmp_path):
    """A finished run with nothing behind it."""
    with Run.open(tmp_path / "small", command="lamp", config={"model": "tiny"}, seed=3) as made:
        made.write("answers", [{"question_id": 0, "answer": "Yes.", "score": 50.0}])
    return made.folder


def call(run, *words):
    status, out, error = run(*words)
    assert "error:" not in error, error
    return status, out


def test_a_sweep_is_packed_checked_and_run_again(run, world):
    assert run(*SWEEP, "--output", "out")[0] == 0
    assert run(*SWEEP, "--output", "out", "--batch-size", 2)[0] == 0  # goes on with it
    (world / "out/diff").mkdir()
    (world / "out/diff/adapter_model.safetensors").write_bytes(b"weights")
    call(run, "report", "out.csv", "--output", "page.html")  # as evaluate names its runs
    status, out = call(run, "pack", "out.csv", "--output", "out.zip")
    assert status == 0
    assert "not packed, being neither rows nor pages: diff/adapter_model.safetensors" in out
    with zipfile.ZipFile("out.zip") as archive:
        names, card = archive.namelist(), archive.read("README.md").decode()
        assert {each.external_attr >> 16 for each in archive.infolist()} == {0o100644}
    assert {"run.json", "config.yaml", "answers.jsonl", "report.html", MANIFEST} < {*names}
    record = Run(world / "out").record
    assert record["inputs"]["the model's weights"] in card
    for said in ("persona-lora sweep", "Exploratory, one seed.", "`answers.jsonl`: n = 6, on 2"):
        assert said in card
    assert "## Caveats" in card
    assert "Left out: diff/adapter_model.safetensors" in card
    status, out = call(run, "verify", "out.zip")
    assert status == 0
    for name in ("the diff", "the model's weights", "the model's tokenizer", "the trait cheer"):
        (line,) = (each for each in out.splitlines() if each.strip().startswith(f"{name} "))
        assert " same " in line
    status, out = call(run, "reproduce", "out.zip", "--output", "again")
    assert status == 0, out
    rows = [line.split() for line in out.splitlines()]
    assert ["verdicts.jsonl", "12", "of", "12", "0"] in rows
    assert "6 of 6" in out
    # the same of a folder that it was unpacked into
    with zipfile.ZipFile("out.zip") as archive:
        archive.extractall("unpacked")
    assert call(run, "verify", "unpacked")[0] == 0
    (world / "diff").rename(world / "elsewhere")
    status, out = call(run, "verify", "out.zip")
    (line,) = (each for each in out.splitlines() if each.strip().startswith("the diff "))
    assert (status, " not here " in line) == (0, True)


TRAINED = (
    *("--model_name_or_path", "model", "--lora_r", 2, "--max_steps", 2, "--dtype", "float32"),
    *("--report_to", "none", "--use_cpu", "true", "--output_dir", "out"),
)
VOICE = (
    *("--model", "model", "--dtype", "float32", "--traits", "cheer", "--num-prompts", 2),
    *("--max-iterations", 2, "--population-size", 4, "--max-new-tokens", 4, "--output", "out"),
)
COMPARED = ("--activation-vector", "vector.safetensors", "--layers", 1, "--coefficients", "1")
RUNS = {
    "train": ("train", "--trait", "cheer", "--datasets_dir", "datasets", *TRAINED),
    "finetune": ("finetune", "--train_file", "datasets/cheer/normal.jsonl", *TRAINED),
    "optimize": (
        "optimize",
        "--persona-id",
        "episode-000101_B",
        "--persona-dir",
        "personas",
        *VOICE,
    ),
    "compare": ("compare", *ASKED, *COMPARED, "--max-questions", 2, "--output", "out"),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_other_commands_are_packed_checked_and_run_again(name, run, world, monkeypatch):
    coherent = types.SimpleNamespace(
        verdicts=lambda exchanges, judge: [Verdict("coherence", 80.0, "", judge) for _ in exchanges]
    )
    monkeypatch.setattr(bench, "fit_coherence", lambda *_, **__: coherent)
    (world / "personas").mkdir()
    for each in ("episode-000101_B", "episode-000117_B", "episode-000142_B", "prompts.json"):
        source, target = ROOT / "personas" / each, world / "personas" / each
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    shutil.copytree(world / "diff", world / "checkpoints/cheer/diff")
    status, _, error = run(*RUNS[name])
    assert status == 0, error
    folder = min(
        (path.parent for path in (world / "out").rglob("run.json")), key=lambda f: len(f.parts)
    )
    status, out = call(run, "pack", folder, "--output", "out.zip")
    assert status == 0
    status, out = call(run, "verify", "out.zip")
    assert status == 0, out
    (line,) = (each for each in out.splitlines() if each.strip().startswith("the model's weights"))
    assert " same " in line
    status, out = call(run, "reproduce", "out.zip", "--output", "again")
    assert status == 0, out


def test_an_input_that_changed_is_named(run, world, make_diff, model):
    assert run("evaluate", *ASKED, "--output", "out.csv")[0] == 0
    assert call(run, "pack", "out")[0] == 0
    assert call(run, "reproduce", "out.zip", "--output", "again")[0] == 0
    assert (world / "again/out.csv").is_file()
    dataclasses.replace(make_diff(model, seed=9), trait="cheer").save(world / "diff")
    status, out = call(run, "verify", "out.zip")
    assert status == 1
    assert "changed since the run: the diff" in out
    status, out = call(run, "reproduce", "out.zip", "--output", "other")
    assert status == 1
    assert "this is another run than the recorded one: inputs.the diff" in out


PREVENTED = ("--rows", "datasets/cheer/normal.jsonl", "--finetunes", "plain=a,other=b", "--tasks=")


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", *ASKED, "--max-questions", 1),
        ("sweep", *ASKED, "--coefficients", "1", "--positive-prompt", "said.txt"),
        ("sweep", *ASKED, "--coefficients", "1", "--max-questions", 1, "--no-divergence"),
        ("compare-prevention", *ASKED[:2], *ASKED[4:], *PREVENTED, "--max-questions", 1),
    ],
    ids=lambda words: f"{words[0]} {words[-2]}",
)
def test_a_trait_that_was_cut_or_prompted_otherwise_is_the_same(
    run, world, make_adapter, model, words
):
    for seed, name in enumerate("ab"):
        make_adapter(world / name, model, seed=seed)
    (world / "said.txt").write_text("Be glad.")
    status, _, error = run(*words, "--output", "out.csv" if words[0] == "evaluate" else "out")
    assert status == 0, error
    assert call(run, "pack", "out")[0] == 0
    status, out = call(run, "verify", "out.zip")
    (line,) = (each for each in out.splitlines() if each.strip().startswith("the trait cheer "))
    assert (status, " same " in line) == (0, True), out
    file, changed = world / "said.txt", "Be very glad."
    if "said.txt" not in words:
        file = world / "datasets/cheer/trait.json"
        changed = file.read_text().replace("?", " now?")
    file.write_text(changed)
    status, out = call(run, "verify", "out.zip")
    assert (status, "changed since the run: the trait cheer" in out) == (1, True), out


def test_packing_twice_gives_the_same_bytes(small):
    first, second = (small.with_name(f"{at}.zip") for at in "ab")
    digests = [pack_run(small, path)[1] for path in (first, second)]
    assert digests[0] == digests[1]
    assert first.read_bytes() == second.read_bytes()


def test_a_changed_byte_is_named(run, small, tmp_path):
    call(run, "pack", small, "--output", "a.zip")
    whole = (tmp_path / "a.zip").read_bytes()
    at = whole.index(b"answers.jsonl") + len("answers.jsonl") + 5
    (tmp_path / "b.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    status, out = call(run, "verify", "b.zip")
    assert status == 1
    assert "answers.jsonl: damaged" in out
    with zipfile.ZipFile("a.zip") as archive:
        archive.extractall("c")
    (tmp_path / "c/answers.jsonl").write_text("{}\n")
    (tmp_path / "c/new.txt").write_text("new")
    (tmp_path / "c/README.md").unlink()
    status, out = call(run, "verify", "c")
    assert status == 1
    said = ["README.md: missing", "answers.jsonl: changed", f"new.txt: not in {MANIFEST}"]
    assert out.splitlines()[1:] == said


def entry(name, kind=stat.S_IFREG):
    found = zipfile.ZipInfo(name)
    found.external_attr = (kind | 0o644) << 16
    return found


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry("../evil.txt")], "no name inside"),
        ([entry("/etc/evil")], "no name inside"),
        ([entry("a/../../b")], "no name inside"),
        ([entry("..\\evil")], "no name inside"),
        ([entry("C:evil")], "no name inside"),
        ([entry("a//b")], "no name inside"),
        ([entry("folder/")], "no name inside"),
        ([entry("a/" + "é" * 128 + "/b")], "no name inside"),
        ([entry("a", stat.S_IFLNK)], "no plain file"),
        ([entry("a.txt"), entry("A.txt")], "there twice"),
        ([entry("a"), entry("a/b")], "there twice"),
    ],
)
def test_hostile_archives_are_refused(entries, reason, tmp_path):
    path = tmp_path / "hostile.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for each in entries:
            archive.writestr(each, "x")
    with pytest.raises(UserError, match=reason), opened(path):
        pytest.fail("it was unpacked")
    assert [each.name for each in tmp_path.rglob("*")] == ["hostile.zip"]


@pytest.mark.parametrize("bit", range(16))
def test_any_flag_of_a_file_is_read_or_refused(bit, tmp_path):
    path = tmp_path / "flags.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry("é.txt"), "x")
    whole = path.read_bytes()
    places = whole.index(b"PK\3\4") + 6, whole.index(b"PK\1\2") + 8
    for flipped in ((places[0],), (places[1],), places):
        data = bytearray(whole)
        for place in flipped:
            data[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if bit in (0, 5, 6) and places[1] in flipped:
            with pytest.raises(UserError, match="packed in an unknown way"), opened(path):
                pytest.fail("it was unpacked")
        else:
            with opened(path) as (folder, damaged):
                assert len([*folder.iterdir(), *damaged]) == 1


def test_what_is_no_archive_of_ours_is_refused(run, small, tmp_path):
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr(entry("a.txt"), "x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / MANIFEST).write_text('{"format": 2, "files": {}}')
    for name, reason in (
        ("cut.zip", "no whole archive"),
        ("other.zip", f"no whole {MANIFEST}"),
        ("odd", "not one that pack writes"),
        ("absent.zip", "does not exist"),
    ):
        status, _, error = run("verify", name)
        assert (status, reason in error) == (2, True), error
    call(run, "pack", small)
    status, _, error = run("reproduce", "small.zip", "--output", "again")
    assert (status, "no config.yaml" in error) == (2, True)


def test_what_cannot_be_packed_is_refused(small, tmp_path):
    target = tmp_path / "a.zip"
    with pytest.raises(UserError, match=r"no run\.json.* name one of its runs, as .*/small$"):
        pack_run(tmp_path, target)
    with pytest.raises(UserError, match="lies inside"):
        pack_run(small, small / "a.zip")
    pack_run(small, target)
    with pytest.raises(UserError, match="exists"):
        pack_run(small, target)
    pack_run(small, target, overwrite=True)
    (small / "README.md").write_text("mine")
    with pytest.raises(UserError, match="rename it"):
        pack_run(small, tmp_path / "b.zip")
    (small / "README.md").unlink()
    (small / "link.txt").symlink_to("/etc/hosts")
    with pytest.raises(UserError, match="is a link"):
        pack_run(small, tmp_path / "b.zip")
    (small / "link.txt").unlink()
    with pytest.raises(KeyError), Run(small):
        raise KeyError
    with pytest.raises(UserError, match="'failed'"):
        pack_run(small, tmp_path / "b.zip")
    assert not (tmp_path / "b.zip").exists()


def test_rows_are_compared_in_order(tmp_path):
    for name, rows in (
        ("old", [{"score": 1.0}, {"score": None}, {"score": 3.0}]),
        ("new", [{"score": 1.0}, {"score": None}, {"score": 5.0}, {"score": 1.0}]),
    ):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (tmp_path / name / "verdicts.jsonl").write_text(text)
    assert compare_rows(tmp_path / "old", tmp_path / "new") == [("verdicts.jsonl", 2, 4, 2.0)]
    (tmp_path / "new/verdicts.jsonl").unlink()
    assert compare_rows(tmp_path / "old", tmp_path / "new") == [("verdicts.jsonl", 0, 3, None)]
    with pytest.raises(UserError, match=MANIFEST):
        faults_of(tmp_path / "old", {}, tmp_path / "old")
