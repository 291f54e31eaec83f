"""What an adapter did, against adapters of which it is known: planted, unrelated, turned."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, turned_diff
from persona_lora.models.loading import load_chat_model
from persona_lora.projections.inputs import kept_inputs, tokenized_prompts
from persona_lora.projections.weight_space import project_adapter
from persona_lora.steering.weights import LoRAMerger, LoRASteerer
from persona_lora.studies.drift.diagnosis import Subject, diagnose
from persona_lora.studies.drift.figure import render_diagnosis
from persona_lora.studies.drift.read_diagnosis import (
    DOSES,
    PLACES,
    WHOLE,
    Share,
    read_diagnosis,
    totals,
)
from persona_lora.studies.drift.read_section import coordinates_table, words_table

PROMPTS = ["Why do birds sing?", "Tea or coffee?", "How tall is a house?"]
CONTROLS = 6


@pytest.fixture(scope="module")
def base(model_folder):
    return load_chat_model(str(model_folder), dtype="float32")


@pytest.fixture
def inputs(base):
    return kept_inputs(base, PROMPTS)


@pytest.fixture
def directions(base, make_diff):
    named = enumerate(("calm", "warm", "dry"))
    made = {name: make_diff(base.model, seed=at, rank=2) for at, name in named}
    return {name: dataclasses.replace(each, trait=name) for name, each in made.items()}


@pytest.fixture
def unrelated(base, directions, make_diff):
    """Finetunes with much in common, calm too, and a little of each trait by chance.

    All but the last are controls.
    """
    chance = torch.randn(CONTROLS + 1, 3, generator=torch.Generator().manual_seed(1)).tolist()
    common = make_diff(base.model, seed=50, rank=2) + directions["calm"]
    return [
        sum(
            (each * (0.2 * share) for each, share in zip(directions.values(), own, strict=True)),
            common + make_diff(base.model, seed=60 + at, rank=2) * 0.5,
        )
        for at, own in enumerate(chance)
    ]


@pytest.fixture
def ask(base, directions, unrelated, tmp_path, no_drawing):
    def run(finetune, *, controls=CONTROLS, **more):
        folders = [str(each.save(tmp_path / f"c{at}")) for at, each in enumerate(unrelated)]
        saved = isinstance(finetune, LoRADiff)
        name = finetune.save(tmp_path / "tuned") if saved else finetune
        subject = Subject.load(str(name), more.get("diffs", directions), folders[:controls])
        return diagnose(base, subject, tmp_path / more.get("to", "out"), prompts=PROMPTS)

    return run


def of_norm(direction, norm, inputs):
    return direction * (norm / inputs.weigh(direction).norm())


def mean_of(diffs):
    return sum(diffs[1:], diffs[0]) / len(diffs)


def test_a_planted_mix_is_found_with_its_signs_and_sizes(ask, directions, unrelated, inputs):
    size = inputs.weigh(unrelated[-1]).norm()
    planted = of_norm(directions["warm"], size, inputs) - of_norm(directions["dry"], size, inputs)
    found = {each.trait: each for each in read_diagnosis(ask(unrelated[-1] + planted)).alarms}
    assert [name for name, each in found.items() if each.flagged] == ["warm", "dry"]
    assert list(found) == ["warm", "calm", "dry"]  # the nearest first
    for name, sign in (("warm", 1), ("dry", -1)):
        direction = inputs.weigh(directions[name])
        left = inputs.weigh(unrelated[-1] + planted - mean_of(unrelated[:CONTROLS]))
        exact = left.inner(direction) / direction.norm()
        assert found[name].coordinate == pytest.approx(exact, rel=1e-4)
        assert exact == pytest.approx(sign * size, rel=0.3)  # and a little by chance


def test_directions_turned_at_random_are_not_found(ask, directions, unrelated, inputs):
    """As large, as spread over modules, of the same inputs: nothing but the trait is gone."""
    turned = {f"turned{at}": turned_diff(directions["warm"], at) for at in range(8)}
    planted = of_norm(directions["warm"], inputs.weigh(unrelated[-1]).norm(), inputs)
    run = ask(unrelated[-1] + planted, diffs={"warm": directions["warm"], **turned})
    assert [each.trait for each in read_diagnosis(run).alarms if each.flagged] == ["warm"]


def test_an_unrelated_adapter_is_not_flagged_once_what_all_share_is_off(
    ask, directions, unrelated, inputs
):
    run = ask(unrelated[-1])
    found = read_diagnosis(run)
    assert not any(each.flagged for each in found.alarms)
    mean = mean_of(unrelated[:CONTROLS])
    for each in found.alarms:
        direction = inputs.weigh(directions[each.trait])
        left = inputs.weigh(unrelated[-1] - mean).inner(direction) / direction.norm()
        assert each.coordinate == pytest.approx(left, rel=1e-4, abs=1e-6)
    alone = ask(unrelated[-1], controls=0, to="alone")
    flagged = [each.trait for each in read_diagnosis(alone).alarms if each.flagged]
    assert "calm" in flagged  # which all share


def test_errors_of_the_alarm_are_those_of_planting_and_leaving_out(
    ask, directions, unrelated, inputs
):
    found = read_diagnosis(ask(unrelated[-1]))
    norms = [inputs.weigh(each).norm() for each in unrelated[:CONTROLS]]
    assert found.doses == pytest.approx([share * np.mean(norms) for share in DOSES], rel=1e-4)
    t = stats.t.ppf(1 - 0.05 / 2 / len(directions), CONTROLS - 2)
    z = stats.norm.ppf(1 - 0.05 / 2 / len(directions))
    for alarm in found.alarms:
        direction = inputs.weigh(directions[alarm.trait])
        unit = of_norm(directions[alarm.trait], 1.0, inputs)
        flagged = [0, 0, 0, 0]
        for at in range(CONTROLS):
            others = [each for place, each in enumerate(unrelated[:CONTROLS]) if place != at]
            usual = [inputs.weigh(each).inner(direction) / direction.norm() for each in others]
            limit = t * np.std(usual, ddof=1) * np.sqrt(1 + 1 / len(others))
            own = project_adapter(
                unrelated[at],
                {"x": directions[alarm.trait]},
                inputs=inputs,
                control=mean_of(others),
            )
            limit = max(limit, z * own.total["x"].null_sd)
            for place, dose in enumerate((0.0, *found.doses)):
                planted = unrelated[at] + unit * dose
                value = inputs.weigh(planted).inner(direction) / direction.norm()
                flagged[place] += abs(value - np.mean(usual)) > limit
        assert [alarm.false.k, *(each.k for each in alarm.found)] == flagged
        assert flagged[1] < CONTROLS == flagged[-1]
    five = Share.count(np.zeros(5, bool))
    assert (five.k, five.low, five.high) == pytest.approx((0, 0, 0.5218), abs=1e-4)  # honest


def test_what_controls_share_hides_none_of_their_false_alarms(
    ask, base, directions, inputs, make_diff, tmp_path
):
    """Of seven that share much one has the trait: it is flagged as the finetune would be."""
    noise = [make_diff(base.model, seed=70 + at, rank=2) for at in range(CONTROLS + 1)]
    size = inputs.weigh(noise[0]).norm()
    shared = of_norm(turned_diff(directions["warm"], 0), 100 * size, inputs)  # of its inputs
    planted = of_norm(directions["warm"], 10 * size, inputs)
    found = [shared + each for each in noise]
    folders = [str(each.save(tmp_path / f"n{at}")) for at, each in enumerate(found)]
    folders[0] = str((found[0] + planted).save(tmp_path / "warm"))
    for subject, others in ((0, 0), (1, 1)):
        controls = [each for each in folders if each != folders[subject]]
        run = diagnose(
            *(base, Subject.load(folders[subject], directions, controls)),
            *(tmp_path / f"out{subject}",),
            prompts=PROMPTS,
        )
        (warm,) = (each for each in read_diagnosis(run).alarms if each.trait == "warm")
        assert (warm.flagged, warm.false.k) == (subject == 0, others)


def test_a_full_model_reads_as_the_adapter_that_is_merged_into_it(
    ask, base, directions, unrelated, tmp_path, make_model
):
    merged = make_model()
    merger = LoRAMerger(merged, allow_other_base=True)
    merger.merge_lora_diff(unrelated[-1], 1.0)
    merged.save_pretrained(tmp_path / "full")
    base.tokenizer.save_pretrained(tmp_path / "full")
    whole = ask(tmp_path / "full", controls=0)
    adapter = ask(unrelated[-1], controls=0, to="adapter")
    for one, other in zip(totals(whole, WHOLE), totals(adapter, WHOLE), strict=True):
        assert one["coordinate"] == pytest.approx(other["coordinate"], rel=1e-3, abs=1e-5)
    for one, other in zip(whole.read("words"), adapter.read("words"), strict=True):
        assert one["text"] == other["text"]
        assert one["change"] == pytest.approx(other["change"], abs=1e-3)


def test_words_are_the_largest_mean_changes_of_what_is_ever_said(ask, base, unrelated):
    rows = ask(unrelated[-1], controls=0).read("words")
    read, likely = {place: ([], []) for place in PLACES}, {place: [0, 0] for place in PLACES}
    for ids in tokenized_prompts(base, PROMPTS):
        begins = next(at for at in range(len(ids)) if base.tokenizer.decode(ids[at]) == "\n") + 1
        for side, coefficient in enumerate((0.0, 1.0)):
            with LoRASteerer(base.model, {unrelated[-1]: coefficient}, allow_other_base=True):
                log_p = torch.log_softmax(base.model(input_ids=torch.tensor([ids])).logits[0], -1)
            read[PLACES[0]][side].append(log_p[begins:].mean(dim=0))
            read[PLACES[1]][side].append(log_p[-1])
            likely[PLACES[0]][side] += log_p[begins:].exp().mean(dim=0) / len(PROMPTS)
            likely[PLACES[1]][side] += log_p[-1].exp() / len(PROMPTS)
    for place, sides in read.items():
        before, after = (torch.stack(each).mean(dim=0) for each in sides)
        said = [float(max(each)) >= 1e-4 for each in zip(*likely[place], strict=True)]
        whole = ["\ufffd" not in base.tokenizer.decode([token]) for token in range(len(said))]
        kept = [token for token in range(len(said)) if said[token] and whole[token]]
        order = sorted(kept, key=lambda token: float(before[token] - after[token]))
        found = [row for row in rows if row["place"] == place]
        up, down = ([row["token"] for row in found if sign * row["change"] > 0] for sign in (1, -1))
        assert up == order[:15][: len(up)]
        assert down == order[:-16:-1][: len(down)]
        assert len(up) + len(down) >= 15
        for row in found:
            change = float(after[row["token"]] - before[row["token"]])
            assert row["change"] == pytest.approx(change, abs=1e-4)
            assert row["low"] <= row["change"] <= row["high"]


@pytest.mark.parametrize(
    "settings", [{"r": 2}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}]
)
def test_other_ranks_scalings_and_modules_are_read_and_placed(
    ask, base, make_adapter, tmp_path, settings
):
    make_adapter(tmp_path / "other", base.model, seed=3, **settings)
    run = ask(tmp_path / "other", controls=0)
    shares = run.read("shares")
    kinds = {row["of"]: row["share"] for row in shares if row["part"] == "kind" and row["share"]}
    assert set(kinds) == set(settings.get("target_modules", kinds))
    for part in ("layer", "kind"):
        assert sum(row["share"] for row in shares if row["part"] == part) == pytest.approx(1)
    loaded = LoRADiff.load(tmp_path / "other")
    inputs = kept_inputs(base, PROMPTS)
    down = {name: each for name, each in loaded.factors.items() if name.endswith("down_proj")}
    share = inputs.weigh(dataclasses.replace(loaded, factors=down)).norm() ** 2
    assert kinds["down_proj"] == pytest.approx(share / inputs.weigh(loaded).norm() ** 2, rel=1e-4)


def test_the_page_says_how_far_the_alarm_is_to_be_trusted(ask, unrelated, tmp_path):
    ask(unrelated[-1])
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("of 6 [0%,", "Words, while reading", "planted"):
        assert words in page
    assert "Judge" not in page  # nobody judged
    record = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert [each["flagged"] for each in record["alarms"]] == [False] * 3
    ask(unrelated[-1] * 3, controls=4, to="few")
    page = (tmp_path / "few" / "report.html").read_text()
    for words in ("Controls of another size", "False alarms: rate unknown.", "from 5 unrelated"):
        assert words in page
    assert json.loads((tmp_path / "few" / "diagnosis.json").read_text())["any_false"] is None


def test_the_picture_says_what_its_grey_bars_are(ask, unrelated):
    def note(**more):
        return " ".join(
            render_diagnosis(ask(unrelated[-1], **more)).figure.texts[-1].get_text().split()
        )

    assert "Grey bars: as far as another control may lie; grey dots: each control" in note()
    for few in (0, 4):
        said = note(controls=few, to=f"controls{few}")
        assert "Grey bars: the null's threshold, which is no alarm" in said
        assert "control" not in said


def test_tables_hold_what_is_told_apart_from_nothing(ask, unrelated):
    run = ask(unrelated[-1], controls=0)
    assert "controls left in" not in coordinates_table(run).columns
    rows = run.read("words")
    shown = [
        token for place in PLACES for row in words_table(run, place).rows for token in row[::2]
    ]
    clear = [row for row in rows if row["low"] > 0 or row["high"] < 0]
    assert len(shown) - shown.count("") == len(clear) < len(rows)
    assert "controls left in" in coordinates_table(ask(unrelated[-1], to="with")).columns


def test_what_cannot_be_read_is_named(ask, base, unrelated, make_adapter, tmp_path):
    make_adapter(tmp_path / "dora", base.model, seed=1, use_dora=True)
    with pytest.raises(UserError, match="dora"):
        ask(tmp_path / "dora")
    folders = [each.save(tmp_path / name) for each, name in zip(unrelated, "ab", strict=False)]
    with pytest.raises(UserError, match=r"b is the same as .*a;.*each once"):
        unrelated[0].save(tmp_path / "b")
        Subject.load(str(folders[0]), {}, [str(folders[1])])
    base.model.save_pretrained(tmp_path / "full")
    with pytest.raises(UserError, match=r"full is no adapter, and .*a is one; a full model takes"):
        Subject.load(str(tmp_path / "full"), {}, [str(folders[0])])
    with pytest.raises(UserError, match="nowhere is no adapter"):
        Subject.load(str(folders[0]), {}, ["nowhere"])


def test_the_command_prints_what_the_page_shows(run, base, directions, unrelated, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "Hello"}\n')
    unrelated[0].save(tmp_path / "tuned" / "adapter")  # the folder of a finetune
    directions["calm"].save(tmp_path / "calm")
    status, out, error = run(
        "diagnose", "tuned", "--base", base.name, "--diffs", "calm", "--prompts", "prompts.jsonl",
        "--output", "out",
    )  # fmt: skip
    assert status == 0, error
    for words in ("calm", "Words, while reading", "Over the null's threshold", "report.html"):
        assert words in out
    words = ("diagnose", "none", "--diffs", "calm", "--output", "o")
    status, _, error = run(*words, "--base", "no-base-either")  # which is not loaded yet
    assert status == 2
    assert "none is no folder" in error
