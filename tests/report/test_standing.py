from __future__ import annotations

import pytest
import yaml

from persona_lora.core.protocol import Design, FrozenProtocol
from persona_lora.core.runs import Output, Run
from persona_lora.report.trust import standing


@pytest.fixture
def finished(tmp_path, sweep_rows):
    """A finished sweep of 12 questions, of which a few may lack a score at the highest one."""

    def make(*, frozen=True, unscored=0, config=None):
        answers, verdicts = sweep_rows(trait="evil")
        last = [row["row"] for row in answers if row["coefficient"] == 2.0][:unscored]
        for row in verdicts:
            if row["row"] in last and row["criterion"] == "evil":
                row["score"] = None
        family = tuple({f"{row['coefficient']:+g}" for row in answers if row["coefficient"]})
        protocol = FrozenProtocol("sweep", {"eval": 12}, family)
        path = tmp_path / "protocol.yaml"
        path.write_text(yaml.safe_dump(protocol.as_dict()))
        output = Output(tmp_path / "run", protocol=FrozenProtocol.read(path) if frozen else None)
        design = Design.of("sweep", {"eval": 12}, family)
        config = {"trait": "evil", **(config or {})}
        with Run.open(output, command="sweep", config=config, seed=0, design=design) as run:
            run.append("answers", answers)
            run.append("verdicts", verdicts)
        return run

    return make


def test_a_run_without_a_protocol_is_exploratory(finished):
    assert standing(finished(frozen=False)) == "Exploratory."


def test_a_run_that_did_what_was_planned_says_so_with_the_hash(finished):
    run = finished(unscored=2)  # 10 of 12 are more than 80%
    named = f"sha256 {run.record['protocol']['sha256'][:12]}…"
    assert standing(run) == f"Pre-registered ({named})."


def test_too_few_scores_make_it_exploratory_and_it_says_where(finished):
    said = standing(finished(unscored=3))
    assert said.startswith("Exploratory (it deviates from its protocol, sha256 ")
    assert "75% of the questions were scored under lora +2, 80% were to be" in said


@pytest.mark.parametrize("other", [{"layer": 9}, {"coefficient": 2.0001}])
def test_conditions_that_look_alike_are_held_to_it_each(finished, other):
    run = finished(unscored=3)
    answers, verdicts = run.read("answers"), run.read("verdicts")
    more = [
        {**row, **other, "row": row["row"] + 1000} for row in answers if row["coefficient"] == 2
    ]
    run.write("answers", [*answers, *more])
    scored = [{"row": row["row"], "criterion": "evil", "score": 50.0} for row in more]
    run.write("verdicts", [*verdicts, *scored])
    assert "75% of the questions were scored under lora +2" in standing(run)


@pytest.mark.parametrize("place", ["ood", "answers/plain", "answers/plain/evil"])
def test_answers_in_a_folder_below_count_as_that_one_s(finished, place):
    run = finished(unscored=3)
    with Run.open(run.folder / place, command="evaluate", config={}, seed=0) as part:
        for name in ("answers", "verdicts"):
            part.write(name, run.read(name))
            (run.folder / f"{name}.jsonl").unlink()
    run.write("splits", [{"split": place}] * (place == "ood"))
    said = standing(run)
    assert f"75% of the questions were scored under lora +2 ({place}), 80% were to be" in said


def test_held_out_prompts_count_for_each_persona(finished):
    run = finished()
    scores = {("a", 0): 3.0, ("a", 1): 4.0, ("b", 0): None, ("b", 1): 2.0}
    rows = [
        {"condition": "random", "persona": who, "prompt_id": at, "score": score}
        for (who, at), score in scores.items()
    ]
    run.write("held_out", rows)
    said = standing(run)
    assert "75% of the questions were scored under random, 80% were to be" in said


def test_an_unfinished_run_keeps_no_protocol(finished):
    run = finished()
    run._update(status="running")
    assert "recorded as “running”" in standing(run)


@pytest.mark.parametrize("config", [{"diff_norm": 1.0}, {"diffs": ["d"]}, {"adapter": "a"}])
def test_one_trained_seed_is_said_and_what_was_not_trained_has_none(finished, config):
    assert standing(finished(frozen=False, config=config)) == "Exploratory, one seed."
    assert standing(Run(finished(frozen=False, config=config).folder), 3) == "Exploratory, 3 seeds."


def test_no_directions_no_seed(finished):
    config = {"diffs": [], "adapter": None}
    assert standing(finished(frozen=False, config=config)) == "Exploratory."
