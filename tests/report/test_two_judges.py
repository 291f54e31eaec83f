"""Two judges side by side: agreement over answers, and a warning where they disagree on a sign."""

from __future__ import annotations

import csv

import pytest
from scipy.stats import spearmanr

from persona_lora.report.sections import Table
from persona_lora.report.trust import judge_blocks
from persona_lora.report.two_judges import (
    across_runs,
    agreement_line,
    lead_of,
    opposed_line,
    two_judges,
)
from persona_lora.report.wording import headline
from persona_lora.studies.steering.read import summary_lines, sweep_content
from persona_lora.studies.steering.run import write_results

TRAIT = "sycophancy"


def read_csv(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def second_opinion(run, change):
    """Let a second judge see the first one's scores changed; rows and coherence as they are."""
    conditions = {row["row"]: row["coefficient"] for row in run.read("answers")}
    rows = [
        {**row, "judge": "other", "score": change(row["score"], conditions[row["row"]])}
        for row in run.read("verdicts")
        if row["criterion"] == TRAIT
    ]
    run.write("second_verdicts", rows)
    (validation,) = [row for row in run.read("validation") if row["criterion"] == TRAIT]
    run.write("second_validation", [{**validation, "judge": "other", "auc": 0.71}])


def flipped(score, coefficient):
    """Say the opposite of what the first says of +2, and the same of all else."""
    return 100 - score if coefficient == 2.0 else score


def test_judges_that_agree_stand_side_by_side_without_a_warning(make_sweep_run):
    run = make_sweep_run()
    second_opinion(run, lambda score, _: 20 + score / 2)
    found = two_judges(run, TRAIT)
    assert found.rho.value == pytest.approx(1.0)
    assert found.rho.n == 12 * 12
    assert not any(each.opposed for each in found.effects)
    assert found.effects[0].second.mean == pytest.approx(found.effects[0].first.mean / 2)
    lead = lead_of("It rises.", found, run, TRAIT)
    assert lead.startswith("It rises. Two judges: ")
    assert "by embedding and" in lead
    said = "ρ 1.00 [not known: resamples alike] over 144 answers; one sign in 11 of 11 changes."
    assert said in lead


def test_the_tables_hold_what_the_second_judge_gave(make_sweep_run, no_drawing):
    run = make_sweep_run(layers=(3,), coefficients=(-1.0, 1.0), control=3)
    alone = write_results(run, TRAIT)
    names = ("sweep.csv", "summary.csv")
    assert not any("_second" in (alone.run / name).read_text() for name in names)
    second_opinion(run, lambda score, _: 20 + score / 2)
    write_results(run, TRAIT)
    answers, long = (read_csv(run.folder / name) for name in names)
    given = {row["row"]: row["score"] for row in run.read("second_verdicts")}
    first, second = ([float(row[name]) for row in answers] for name in (TRAIT, f"{TRAIT}_second"))
    assert second == [given[at] for at in sorted(given)]
    found = two_judges(run, TRAIT)
    assert spearmanr(first, second).statistic == pytest.approx(found.rho.value)
    mean = next(each.second for each in found.means if each.place == "random +1 at layer 3")
    at = {(row["method"], row["coefficient"], row["statistic"]): row for row in long}
    assert len(at) == len(long)
    assert float(at["random", "1.0", "trait_second"]["value"]) == pytest.approx(mean.mean)
    assert float(at["random", "1.0", "trait_second"]["low"]) == pytest.approx(mean.low)
    gain = [
        float(at["activation", "", f"gain_over_random{end}"]["value"]) for end in ("", "_second")
    ]
    assert gain[1] == pytest.approx(gain[0] / 2)
    assert not any("coheren" in row["statistic"] for row in long if "_second" in row["statistic"])


def test_a_sign_that_the_judges_disagree_on_stands_first_in_text_and_page(make_sweep_run):
    run = make_sweep_run()
    second_opinion(run, flipped)
    found = two_judges(run, TRAIT)
    assert [each.place for each in found.effects if each.opposed] == ["+2"]
    content = sweep_content(run)
    for lead in (content.lead, summary_lines(content.subject, run)[0]):
        assert lead.startswith(
            "The two judges disagree on the sign of a change of sycophancy (+2: +"
        )
        assert headline(content.subject) in lead
    (table,) = [
        each for each in content.blocks if getattr(each, "title", "") == "Two judges on sycophancy"
    ]
    signs = {row[0]: row[-1] for row in table.rows}
    assert (signs["+2"], signs["+1"], signs["unsteered"]) == ("opposed", "one", "")


def test_of_many_disagreements_the_largest_are_named(make_sweep_run):
    run = make_sweep_run()
    second_opinion(run, lambda score, _: 100 - score)
    found = two_judges(run, TRAIT)
    count = sum(each.opposed for each in found.effects)
    line = opposed_line(found)
    assert line.count(" by other") == 3
    assert line.endswith(f"; and {count - 3} more).")


def test_signs_that_neither_interval_tells_are_no_disagreement(make_sweep_run):
    run = make_sweep_run(coefficients=(0.0, 0.001), noise=20.0)
    second_opinion(run, lambda score, _: 100 - score)
    (effect,) = [each for each in two_judges(run, TRAIT).effects if each.place == "+0.001"]
    assert effect.first.mean == pytest.approx(-effect.second.mean)
    assert not effect.opposed


def test_one_judge_is_said_to_be_one_and_an_old_run_reads_as_before(make_sweep_run):
    run = make_sweep_run()
    assert two_judges(run, TRAIT) is None
    content = sweep_content(run)
    assert content.lead == f"{headline(content.subject)} One judge: embedding."
    assert agreement_line(None, "") == ""


def test_fitness_and_time_of_both_stand_beside_one_another(make_sweep_run):
    run = make_sweep_run()
    second_opinion(run, flipped)
    for judge, seconds in (("embedding", 1.5), ("other", 2.0), ("embedding", 1.5)):
        run.append("judging", [{"judge": judge, "answers": 10, "seconds": seconds}])
    (table, took, *_) = judge_blocks(run)
    assert isinstance(table, Table)
    assert [(row[0], row[1], row[5]) for row in table.rows] == [
        (TRAIT, "embedding", "0.92"),
        ("coherence", "embedding", "0.95"),
        (TRAIT, "other", "0.71"),
    ]
    assert took.text.endswith("embedding 3.0 s for 20 verdicts; other 2.0 s for 10 verdicts.")


def test_runs_are_compared_with_one_of_them_by_both_judges(make_sweep_run):
    runs = {}
    for name, lift in (("base", 0.0), ("tuned", 20.0)):
        run = make_sweep_run(name, coefficients=(0.0, 1.0), prompts=())
        verdicts = [
            {**row, "score": min(100.0, row["score"] + lift)} if row["criterion"] == TRAIT else row
            for row in run.read("verdicts")
        ]
        run.write("verdicts", verdicts)
        second_opinion(run, lambda score, _: 100 - score)
        runs[name] = run
    found = across_runs(TRAIT, runs, "base")
    (effect,) = found.effects
    assert effect.place == "tuned"
    assert effect.opposed
    assert across_runs(TRAIT, {"tuned": runs["tuned"]}, "base").effects == ()
    (runs["base"].folder / "second_verdicts.jsonl").unlink()
    assert across_runs(TRAIT, runs, "base").effects == ()


def test_training_seeds_are_compared_with_the_same_seed_of_the_reference(make_sweep_run):
    def seeds(name, *lifts):
        for number, lift in enumerate(lifts):
            run = make_sweep_run(f"{name}{number}", coefficients=(0.0,), prompts=())
            verdicts = [{**row, "score": 30.0 + lift} for row in run.read("verdicts")]
            run.write("verdicts", verdicts)
            second_opinion(run, lambda score, _: score + 1)
            yield run

    runs = {
        "plain": [*seeds("plain", 0.0, 9.0, 36.0)],
        "added": [*seeds("added", 5.0, 14.0, 41.0)],
        "base": [*seeds("base", 20.0)],
    }
    found = across_runs(TRAIT, runs, "plain")
    effects = {each.place: each for each in found.effects}
    assert effects["added"].first.mean == pytest.approx(5.0)
    assert effects["added"].second.mean == pytest.approx(5.0)
    assert effects["base"].first.mean == pytest.approx(20.0 - 15.0)
    answers = len(runs["base"][0].read("answers"))
    assert found.rho.n == 7 * answers
    alone = across_runs(TRAIT, {**runs, "plain": runs["plain"][:1]}, "plain")
    assert {each.place: each.first.mean for each in alone.effects} == pytest.approx(
        {"added": 20.0, "base": 20.0}
    )
