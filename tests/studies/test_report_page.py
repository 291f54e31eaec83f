"""The report: self-contained, escaped, complete, and honest about weak judges and partial runs."""

from __future__ import annotations

import html
import json
from html.parser import HTMLParser

import pytest

from persona_lora.core.errors import UserError
from persona_lora.studies.report_page import run_kind, write_report

VOID = {"meta", "img", "br"}


class _Page(HTMLParser):
    """Collect what a page loads and its text; check that tags are nested properly."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in {"src", "href", "srcset", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _page(path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_report_contains_every_answer_escaped(make_sweep_run, tmp_path):
    run = make_sweep_run(questions=3)
    text = write_report(run.folder, tmp_path / "report.html").read_text(encoding="utf-8")
    for answer in run.read("answers"):
        assert html.escape(answer["answer"]).replace("&quot;", "&#34;") in text
        assert html.escape(answer["question"]) in text
    assert "<b>0</b>" not in text
    assert "<claim" not in text


def test_report_loads_nothing_and_is_well_formed(make_sweep_run, tmp_path):
    runs = [make_sweep_run(trait, trait=trait, questions=3).folder for trait in ("evil", "calm")]
    path = write_report(runs, tmp_path / "report.html")
    page = _page(path)
    assert page.loads
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    styles = path.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles


def test_report_shows_the_nearest_coefficients_side_by_side(make_sweep_run, tmp_path):
    run = make_sweep_run(coefficients=(-1.0, 0.0, 0.5, 1.0), questions=2)
    text = write_report(run.folder, tmp_path / "report.html").read_text(encoding="utf-8")
    examples = text.split("side by side</h3>")[1].split("<details>")[0]
    labels = [part.split("</h5>")[0] for part in examples.split("<h5>")[1:]]
    assert labels == ["−1", "0", "+1", "negative prompt", "neutral prompt", "positive prompt"] * 2


def test_report_states_provenance_statistics_and_judge(make_sweep_run, tmp_path):
    run = make_sweep_run(questions=9)  # with six nothing could pass the correction
    text = " ".join("".join(_page(write_report(run.folder, tmp_path / "r.html")).text).split())
    for expected in (
        *("tiny-model", "checkpoints/tiny/diff", "Seed7", "torch", "0.92"),
        *("Spearman's ρ", "Holm", "positive prompt", "rises with the coefficient"),
    ):
        assert expected in text
    assert "Read with caution" not in text
    assert "Incomplete" not in text


def test_report_warns_of_a_weak_judge_and_of_an_unfinished_run(make_sweep_run, tmp_path):
    run = make_sweep_run(questions=3, auc=0.71)
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    text = write_report(run.folder, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Read with caution" in text
    assert "0.71" in text
    assert "Incomplete" in text


def test_report_of_unscored_answers_gives_reasons(make_sweep_run, tmp_path):
    run = make_sweep_run(questions=2)
    for name in ("verdicts", "validation", "divergence"):
        run.write(name, [])
    text = "".join(_page(write_report(run.folder, tmp_path / "r.html")).text)
    assert "no scored answer" in text
    assert "unscored" in text
    assert "no validation of its judge" in text
    assert "nan" not in text.lower().split()


def test_report_of_a_controlled_vector_shows_the_control(make_sweep_run, tmp_path):
    run = make_sweep_run(layers=(12,), coefficients=(-2.0, -1.0, 1.0, 2.0), control=True)
    path = write_report(run.folder, tmp_path / "r.html")
    text = " ".join("".join(_page(path).text).split())
    for expected in (
        *("Sycophancy, layer 12", "Against a random direction", "beats a random direction"),
        *("all of them, in the expected direction", "‖cv‖/ ‖h‖", "random +2"),
    ):
        assert expected in text
    examples = path.read_text(encoding="utf-8").split("side by side</h3>")[1].split("<details>")[0]
    labels = [part.split("</h5>")[0] for part in examples.split("<h5>")[1:]][:8]
    assert labels == [
        *("−2", "0", "+2"),
        *("random −2", "random +2", "negative prompt", "neutral prompt", "positive prompt"),
    ]


def test_report_of_a_grid_shows_the_ranking_and_answers_at_the_best_layer(make_sweep_run, tmp_path):
    run = make_sweep_run(layers=(4, 8, 12), coefficients=(-2.0, 1.0, 2.0), questions=6)
    path = write_report(run.folder, tmp_path / "r.html")
    source = path.read_text(encoding="utf-8")
    text = " ".join("".join(_page(path).text).split())
    for expected in ("by layer and coefficient", "Not a held-out result", "best at layer 12"):
        assert expected in text
    ranking = source.split("the best first</h3>")[1].split("<details>")[0]
    assert ranking.index("<td>12</td>") < ranking.index("<td>8</td>") < ranking.index("<td>4</td>")
    listed = source.split("All answers at layer 12")[1]
    for answer in run.read("answers"):
        shown = html.escape(answer["answer"]).replace("&quot;", "&#34;") in listed
        assert shown == (answer["layer"] in (12, None))


def test_report_of_a_grid_without_a_best_layer_says_why(make_sweep_run, tmp_path):
    run = make_sweep_run(layers=(4, 8), coefficients=(1.0,), questions=2, control=True)
    run.write("verdicts", [])
    text = "".join(_page(write_report(run.folder, tmp_path / "r.html")).text)
    assert "no best layer: coherence was not scored" in text
    assert "nan" not in text.lower().split()


def test_report_shows_any_mix_of_runs(make_sweep_run, tmp_path):
    kinds = {
        "lora": {},
        "vector": {"layers": (12,), "coefficients": (-1.0, 1.0), "control": True},
        "grid": {"layers": (4, 12), "coefficients": (-1.0, 1.0)},
        "prompts": {"layers": (4,), "coefficients": ()},
    }
    runs = [make_sweep_run(name, questions=3, **rows) for name, rows in kinds.items()]
    assert [run_kind(run) for run in runs] == ["sweep", "sweep", "grid", "sweep"]
    page = _page(write_report([run.folder for run in runs], tmp_path / "r.html"))
    text = " ".join("".join(page.text).split())
    assert "4 runs" in text
    assert "Unsteered, the model scores" in text
    pictures = [load for load in page.loads if load.startswith("data:")]
    assert len(pictures) == 5  # one each, and the overview of the three curves


def test_report_refuses_a_run_of_another_kind(make_sweep_run, tmp_path):
    run = make_sweep_run()
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, "command": "train"}))
    with pytest.raises(UserError, match=r"a run of 'train'; the report shows runs of sweep"):
        write_report(run.folder, tmp_path / "r.html")


def test_report_refuses_folders_without_a_sweep(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "absent", tmp_path / "r.html")
    with pytest.raises(UserError, match="no run to report on"):
        write_report([], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
