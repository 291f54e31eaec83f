"""A grid: cells against a naive loop, the rule for the best layer, and degenerate grids."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import numpy as np
import pytest

from persona_lora.core.errors import UserError
from persona_lora.report.resampling import holm, question_weights
from persona_lora.studies.steering import read_words
from persona_lora.studies.steering.read_grid import is_grid, summarise_grid, write_grid


def _grid(answers, verdicts, **options):
    options = {"trait": "sycophancy", "resamples": 300, **options}
    return summarise_grid(answers, verdicts, **options)


def _rescored(answers, verdicts, score, criterion="sycophancy"):
    return [
        {**each, "score": score(answers[each["row"]])} if each["criterion"] == criterion else each
        for each in verdicts
    ]


def _table(answers, verdicts, criterion):
    """Return scores by (layer, coefficient) as arrays over questions, one sample each."""
    scores = {each["row"]: each["score"] for each in verdicts if each["criterion"] == criterion}
    table: dict = {}
    for row in answers:
        table.setdefault((row["layer"], row["coefficient"]), []).append(scores[row["row"]])
    return {place: np.array(values) for place, values in table.items()}


def test_cells_and_best_layer_equal_a_naive_loop(grid_rows):
    answers, verdicts = grid_rows(prompts=())
    grid = _grid(answers, verdicts)
    trait, coherence = (_table(answers, verdicts, each) for each in ("sycophancy", "coherence"))
    best = {}
    for cell in grid.cells:
        place = cell.layer, cell.coefficient
        change = trait[place] - trait[None, None]
        assert cell.trait.mean == pytest.approx(trait[place].mean())
        assert cell.coherence.mean == pytest.approx(coherence[place].mean())
        assert cell.from_zero.interval.mean == pytest.approx(change.mean())
        if coherence[place].mean() >= 50:
            gain = np.sign(cell.coefficient) * change.mean()
            best[cell.layer] = max(best.get(cell.layer, -np.inf), gain)
    assert len(grid.cells) == len(trait) - 1
    assert grid.ranking == tuple(sorted(best, key=best.get, reverse=True))
    assert grid.best_layer == grid.ranking[0] == 12
    assert grid.best.gain.mean == pytest.approx(best[12])
    assert grid.best.gain.low <= grid.best.gain.mean <= grid.best.gain.high


def test_holm_is_over_all_cells_of_the_grid(grid_rows):
    grid = _grid(*grid_rows())
    p = [cell.from_zero.p for cell in grid.cells]
    assert [cell.from_zero.p_holm for cell in grid.cells] == holm(p)


def test_a_negative_coefficient_gains_where_the_trait_falls(grid_rows):
    answers, verdicts = grid_rows(coefficients=(-1.0,))
    falls = _rescored(answers, verdicts, lambda row: 50 + 20 * (row["coefficient"] or 0))
    best = _grid(answers, falls).best
    assert (best.coefficient, best.gain.mean) == (-1.0, pytest.approx(20))
    rises = _rescored(answers, verdicts, lambda row: 50 - 20 * (row["coefficient"] or 0))
    grid = _grid(answers, rises)
    assert grid.best.gain.mean == pytest.approx(-20)
    assert "No layer moves sycophancy in the expected direction" in read_words.headline(grid)


def test_incoherent_cells_cannot_win_and_ties_go_to_the_lower_layer(grid_rows):
    answers, verdicts = grid_rows(coefficients=(1.0, 2.0))
    flat = _rescored(answers, verdicts, lambda row: 50 + 10 * (row["coefficient"] or 0))
    tied = _grid(answers, flat)
    assert tied.ranking == (4, 8, 12, 16)
    assert tied.best_coefficient == 2.0
    assert tied.selection.layer_shares == {4: 1.0}

    def coherence(row):
        return 20.0 if row["coefficient"] == 2.0 or row["layer"] == 4 else 80.0

    broken = _grid(answers, _rescored(answers, flat, coherence, "coherence"))
    assert (broken.best_layer, broken.best_coefficient) == (8, 1.0)
    assert broken.ranking == (8, 12, 16)
    assert "keeps a mean coherence of 50" in broken.at_layer(4).reason
    assert [each.layer for each in read_words.ranked(broken)] == [8, 12, 16, 4]
    lenient = _grid(
        answers, _rescored(answers, flat, coherence, "coherence"), coherent_threshold=10
    )
    assert (lenient.best_layer, lenient.best_coefficient) == (4, 2.0)


def test_the_rank_correlation_of_a_layer_counts_the_unsteered_model(grid_rows):
    answers, verdicts = grid_rows(coefficients=(-1.0, 1.0))
    slopes = {4: 5, 8: -5, 12: 0, 16: 10}
    lines = _rescored(
        answers, verdicts, lambda row: 50 + slopes.get(row["layer"], 0) * (row["coefficient"] or 0)
    )
    rho = {each.layer: each.rho_means for each in _grid(answers, lines).by_layer}
    assert [rho[layer].value for layer in (4, 8, 16)] == pytest.approx([1, -1, 1])
    assert rho[4].n == 3
    assert "do not vary" in rho[12].reason


def test_selection_repeats_the_choice_in_every_resample(grid_rows):
    answers, verdicts = grid_rows(prompts=(), noise=30.0, layers=(8, 12), questions=6)
    grid = _grid(answers, verdicts, resamples=60, seed=3)
    trait, coherence = (_table(answers, verdicts, each) for each in ("sycophancy", "coherence"))
    wins, left_out = {8: 0, 12: 0}, []
    for drawn in question_weights(6, resamples=60, seed=3):
        gains = {
            place: np.sign(place[1]) * (trait[place] - trait[None, None])
            for place in trait
            if place[1] is not None and np.average(coherence[place], weights=drawn) >= 50
        }
        chosen = max(gains, key=lambda place: np.average(gains[place], weights=drawn))
        wins[chosen[0]] += 1
        if (drawn == 0).any():
            left_out.append(gains[chosen][drawn == 0].mean())
    assert 0 < wins[8] < 60
    assert grid.selection.layer_shares == {layer: wins[layer] / 60 for layer in (8, 12)}
    assert grid.selection.left_out_gain == pytest.approx(np.mean(left_out))


def test_a_grid_with_a_control_compares_every_layer_with_it(grid_rows):
    answers, verdicts = grid_rows(control=True)
    grid = _grid(answers, verdicts)
    assert {cell.method for cell in grid.cells} == {"activation", "random"}
    assert len(grid.steered) == len(grid.cells) / 2 == 16
    over = {each.layer: each.over_control for each in grid.by_layer}
    assert over[12].interval.low > 20
    assert [each.p_holm for each in over.values()] == holm([each.p for each in over.values()])
    said = read_words.headline(grid)
    assert said.startswith("Steering works best at layer 12")
    assert "Beyond a random direction at layer 12 the vector gains" in said
    # The control's cells are corrected among themselves, and never the best layer.
    alone = _grid(*grid_rows())
    assert len(alone.cells) == 16
    assert alone.at_layer(12).over_control is None


def test_a_random_direction_that_does_as_much_stands_first(grid_rows):
    answers, verdicts = grid_rows(control=True)
    at = {row["row"]: row for row in answers}
    own = {
        (row["layer"], row["coefficient"], row["question_id"]): verdict["score"]
        for verdict in verdicts
        if (row := at[verdict["row"]])["method"] == "activation"
        and verdict["criterion"] == "sycophancy"
    }
    for verdict in verdicts:  # the random direction's scores are the vector's, on another question
        row = at[verdict["row"]]
        if row["method"] == "random" and verdict["criterion"] == "sycophancy":
            other = row["question_id"] ^ 1
            verdict["score"] = own[row["layer"], row["coefficient"], other]
    said = read_words.headline(_grid(answers, verdicts))
    assert said.startswith("At layer 12 the vector does not clearly beat a random direction: ")
    assert "Steering works best at layer 12" in said


def test_missing_cells_and_scores_are_left_out_with_reasons(grid_rows):
    answers, verdicts = grid_rows(coefficients=(1.0, 2.0))
    kept = {row["row"] for row in answers if (row["layer"], row["coefficient"]) != (12, 2.0)}
    answers = [row for row in answers if row["row"] in kept]
    rows = {row["row"]: row for row in answers}
    verdicts = [
        {**each, "score": None} if rows[each["row"]]["layer"] == 8 else each
        for each in verdicts
        if each["row"] in kept
    ]
    grid = _grid(answers, verdicts)
    assert grid.cell(12, 2.0) is None
    assert grid.cell(8, 1.0).trait.reason == "no scored answer"
    assert grid.at_layer(8).reason == "coherence was not scored"
    assert grid.best_layer == 12
    json.dumps(asdict(grid), allow_nan=False)


def test_a_grid_without_scores_or_unsteered_rows_has_no_best_layer(grid_rows):
    answers, verdicts = grid_rows()
    for rows, kept, reason in (
        (answers, [], "coherence was not scored"),
        (
            [row for row in answers if row["method"] != "none"],
            [each for each in verdicts if each["row"] >= 12],
            "the unsteered model was not run",
        ),
    ):
        grid = _grid(rows, kept)
        assert (grid.best_layer, grid.best, grid.selection, grid.ranking) == (None, None, None, ())
        assert f"There is no best layer: {reason}." in read_words.headline(grid)
        json.dumps(asdict(grid), allow_nan=False)


def test_one_question_gives_a_best_layer_without_claims(grid_rows):
    grid = _grid(*grid_rows(questions=1))
    assert grid.best_layer is not None
    assert grid.selection is None
    text = read_words.headline(grid)
    assert "one question: no test" in text
    json.dumps(asdict(grid), allow_nan=False)


def test_the_headline_says_when_no_cell_could_pass_the_correction(grid_rows):
    few, many = (_grid(*grid_rows(questions=count)) for count in (8, 12))
    assert "with so few questions no cell could pass that correction" in read_words.headline(few)
    assert "16 cells is 0.125" in read_words.resolution_note(few)
    assert read_words.resolution_note(many) == ""
    start, end = many.unsteered.trait.mean, many.cell(12, many.best_coefficient).trait.mean
    assert f"(from {start:.0f} to {end:.0f})" in read_words.headline(many)
    assert "no cell could" not in read_words.headline(many)


def test_a_coefficient_of_zero_at_a_layer_is_the_unsteered_model(judged):
    places = [("activation", 3, 0.0), ("activation", 3, 1.0), ("activation", 4, 1.0)]
    grid = _grid(*judged(places))
    assert grid.unsteered.rows == 12
    assert grid.coefficients == (1.0,)
    assert all(cell.from_zero is not None for cell in grid.cells)


def test_write_grid_writes_json_and_long_csv(make_sweep_run):
    run = make_sweep_run(layers=(4, 12), coefficients=(-1.0, 1.0))
    grid = write_grid(run)
    written = json.loads((run.folder / "grid.json").read_text())
    assert written == json.loads(json.dumps(asdict(grid)))
    assert written["best_layer"] == 12
    assert "sign(c)" in written["rule"]
    assert "took no part in the choice" in written["selection_note"]
    with (run.folder / "grid.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    at = {(r["method"], r["layer"], r["coefficient"], r["statistic"]): r for r in rows}
    assert len(at) == len(rows)
    assert float(at["activation", "12", "1.0", "trait"]["value"]) == grid.cell(12, 1.0).trait.mean
    assert float(at["activation", "12", "1.0", "relative_state_norm"]["value"]) == 0.1
    assert float(at["activation", "12", "", "rho_means"]["value"]) == 1.0
    assert float(at["activation", "12", "1.0", "best_gain"]["value"]) == grid.best.gain.mean
    assert at["none", "", "0.0", "trait"]["n"] == "12"


def test_is_grid_asks_for_several_layers(make_sweep_run):
    assert is_grid(make_sweep_run("grid", layers=(4, 12), coefficients=(1.0,)))
    assert not is_grid(make_sweep_run("one", layers=(4,), coefficients=(1.0,), control=True))
    assert not is_grid(make_sweep_run("lora"))
    assert not is_grid(make_sweep_run("prompts", layers=(4, 12), coefficients=()))


def test_what_is_no_grid_is_refused(sweep_rows):
    with pytest.raises(UserError, match="no steered answers"):
        _grid(*sweep_rows(coefficients=()))
    with pytest.raises(UserError, match="no single layer"):
        _grid(*sweep_rows())
