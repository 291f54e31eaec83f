"""Tables of the report: every column holds the quantity that its heading names."""

from __future__ import annotations

import csv
import json

from persona_lora.core.runs import Run
from persona_lora.report import wording
from persona_lora.report.resampling import Interval
from persona_lora.report.sections import Fold, Table
from persona_lora.report.summary import summarise_run, write_summary
from persona_lora.studies.steering import read
from persona_lora.studies.steering.figure import render_sweep
from persona_lora.studies.steering.read_comparison import FIRST_TOKEN, TOKENS, Overall, Point, Ratio
from persona_lora.studies.steering.read_grid import grid_of


def interval(mean):
    return Interval(mean, mean - 1, mean + 1, 8, 4, 0.5)


def tables(content):
    blocks = [
        inner
        for block in content.blocks
        for inner in (block.blocks if isinstance(block, Fold) else (block,))
    ]
    return {each.title: each for each in blocks if isinstance(each, Table)}


def column(table, name):
    return [row[table.columns.index(name)] for row in table.rows]


def test_the_conditions_of_a_sweep(make_sweep_run):
    run = make_sweep_run(layers=(12,), coefficients=(-1.0, 1.0), control=True, questions=4)
    summary = summarise_run(run)
    found = tables(read.sweep_content(run))
    every = wording.all_conditions(summary)
    conditions = found["Conditions"]
    wanted = {
        "Sycophancy\n[95%]": [wording.interval(each.trait) for each in every],
        "Coherence\n[95%]": [wording.interval(each.coherence) for each in every],
        "‖cv‖\n/ ‖h‖": [wording.significant(each.relative_state_norm) for each in every],
        "KL mean\n(nats)": [wording.significant(each.kl_mean) for each in every],
        "KL p95\n(nats)": [wording.significant(each.kl_p95) for each in every],
        "Answers /\nquestions": [f"{each.rows} / {each.questions}" for each in every],
        "Mean\ntokens": [wording.number(each.mean_tokens) for each in every],
    }
    for name, cells in wanted.items():
        assert column(conditions, name) == cells, name
    assert len(set(wanted["KL mean\n(nats)"])) > 1
    steered = next(each for each in every if each.coefficient == 1.0 and each.method != "random")
    at = every.index(steered)
    assert column(conditions, "Change from 0\n[95%]")[at] == wording.interval(
        steered.from_zero.interval
    )
    assert column(conditions, "p\n(Holm)")[at] == wording.p_value(steered.from_zero.p_holm)
    random = found["Against a random direction"]
    assert column(random, "[95%]") == [
        *(wording.change(each.difference.interval) for each in summary.control.comparisons),
        wording.change(summary.control.overall.interval),
    ]


def test_a_page_says_of_how_many_questions_a_change_is(make_sweep_run):
    """One question has no score unsteered, another none at +1: four of six are behind +1 less 0."""
    run = make_sweep_run(coefficients=(-1.0, 0.0, 1.0), questions=6)
    lost = {
        row["row"]
        for row in run.read("answers")
        if (row["coefficient"], row["question_id"]) in ((0.0, 0), (1.0, 1))
    }
    verdicts = [
        row | ({"score": None, "reason": "?"} if row["row"] in lost else {})
        for row in run.read("verdicts")
    ]
    run.write("verdicts", verdicts)
    run.write("second_verdicts", [r for r in verdicts if r["criterion"] == "sycophancy"])
    found = tables(read.sweep_content(run))
    names = [row[0] for row in found["Conditions"].rows]
    down, up = (names.index(name) for name in ("−1", "+1"))
    changes = column(found["Conditions"], "Change from 0\n[95%]")
    assert (changes[down][-9:], changes[up][-9:]) == (" (5 of 6)", " (4 of 6)")
    judges = found["Two judges on sycophancy"]
    beside = dict(zip(column(judges, ""), column(judges, "Pairs,\neither"), strict=True))
    assert (beside["−1"], beside["+1"]) == ("5 / 5", "4 / 4")


def test_coefficients_that_were_asked_for_in_nats_are_told_in_nats(make_sweep_run):
    run = make_sweep_run(coefficients=(-1.706, 0.0, 1.567), questions=6)
    assert "nat" not in read.summary_table(summarise_run(run)).rows[0][0]
    record = json.loads((run.folder / "run.json").read_text())
    record["config"]["nats"] = [[-1.706, -0.1], [1.567, 0.1]]
    (run.folder / "run.json").write_text(json.dumps(record))
    run = Run(run.folder)
    summary = write_summary(run)
    names = ["−0.1 nat (−1.706)", "0", "+0.1 nat (+1.567)"]
    for table in (read.summary_table(summary), tables(read.sweep_content(run))["Conditions"]):
        assert [row[0] for row in table.rows][:3] == names
    assert all(f"at {name}" in wording.headline(summary) for name in names[::2])
    drawn = [each.get_text() for each in render_sweep(summary).figure.axes[0].texts]
    assert drawn[drawn.index("asked, nats") + 1 :][:3] == ["−0.10", "–", "0.10"]
    with (run.folder / "summary.csv").open(newline="") as stream:
        found = {row["coefficient"]: row["nats"] for row in csv.DictReader(stream)}
    assert (found["-1.706"], found["0.0"], found["1.567"]) == ("-0.1", "", "0.1")


def test_the_layers_of_a_grid(make_sweep_run):
    run = make_sweep_run(layers=(4, 12), coefficients=(-1.0, 2.0), control=True, questions=6)
    grid = grid_of(run)
    layers = tables(read.grid_content(run))["Layers, the best first"]
    ranked = [grid.at_layer(layer) for layer in grid.ranking]
    wanted = {
        "Layer": [str(each.layer) for each in ranked],
        "Gain\n[95%]": [wording.change(each.best.gain) for each in ranked],
        "at c": [wording.coefficient(each.best.coefficient) for each in ranked],
        "p": [wording.p_value(each.best.p) for each in ranked],
        "p (Holm,\n4 cells)": [wording.p_value(each.best.p_holm) for each in ranked],
        "Coherence": [wording.number(each.best.coherence) for each in ranked],
        "Beyond random\n[95%]": [wording.change(each.over_control.interval) for each in ranked],
        "p (Holm,\nlayers)": [wording.p_value(each.over_control.p_holm) for each in ranked],
    }
    for name, cells in wanted.items():
        assert column(layers, name) == cells, name
    assert layers.styles[0] == "best"


def test_methods_compared():
    point = Point(
        "eval", 0, "activation", 1.5, 0.125, 0.5, False, interval(70), interval(90),
        interval(10), 0.2, 0.3,
    )  # fmt: skip
    assert read._point_row(point) == (
        "held-out questions", "activations (steering vector)", "1.50", "0.125 (not matched)",
        "0.50", "–", "70 [69, 71]", "8", "50%", "90 [89, 91]", "10 [9, 11]", "0.300",
    )  # fmt: skip
    overall = Overall("ood", "random", interval(3), interval(20), interval(-2), 0.01, 0.02)
    assert read._overall_row(overall) == (
        "out of distribution", "random vector of the same norm", "3 [2, 4]", "4", "20 [19, 21]",
        "0.020", "−2 [−3, −1]",
    )  # fmt: skip


def test_times():
    assert read._latency_row(Ratio("live", 8, TOKENS, interval(2), 50.0))[2:] == (
        TOKENS, "50.0 tokens/s", "2.00 [1.00, 3.00]",
    )  # fmt: skip
    assert read._latency_row(Ratio("live", 8, FIRST_TOKEN, interval(2), 0.25))[3] == "250 ms"


def test_the_terminal_shows_what_the_page_says_of_a_sweep_and_of_a_grid(make_sweep_run):
    """In fewer columns: the wrong ones would stand under the right headings as well."""
    sweep = make_sweep_run(layers=(12,), coefficients=(-1.0, 1.0), control=True, questions=4)
    assert read.summary_table(summarise_run(sweep)).headings == [
        *("Coefficient or prompt", "Sycophancy [95%]", "Coherence [95%]"),
        *("Scored, % trait / coh.", "Answers / questions", "‖cv‖ / ‖h‖", "KL p95 (nats)"),
    ]
    grid = make_sweep_run(layers=(4, 12), coefficients=(-1.0, 1.0), control=True, questions=4)
    assert read.summary_table(grid_of(grid)).headings == [
        *("Layer", "Gain [95%]", "at c", "p (Holm, 4 cells)", "Coherence", "Spearman’s ρ [95%]"),
    ]
