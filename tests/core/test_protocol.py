"""A protocol freezes what a run does: anything else is refused before the run begins."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import yaml

from persona_lora.core.errors import UserError
from persona_lora.core.protocol import Design, FrozenProtocol
from persona_lora.core.runs import Output, Planned, Run

DESIGN = Design.of("sweep", {"eval": 20}, ("-1", "+1"))
CONFIG = {"trait": "evil", "coefficients": [-1.0, 0.0, 1.0]}


@pytest.fixture
def write(tmp_path):
    def written(**changes):
        frozen = FrozenProtocol("sweep", {"eval": 20}, ("+1", "-1"), settings={"trait": "evil"})
        values = {**frozen.as_dict(), **changes}
        path = tmp_path / "protocol.yaml"
        known = {name: each for name, each in values.items() if each is not None}
        path.write_text(yaml.safe_dump(known))
        return path

    return written


def start(tmp_path, protocol, *, design=DESIGN, config=CONFIG, overwrite=False):
    output = Output(tmp_path / "run", overwrite, protocol=protocol)
    return Run.open(output, command="sweep", config=config, seed=0, design=design)


def test_a_run_that_keeps_its_protocol_carries_its_hash(tmp_path, write):
    path = write()
    with start(tmp_path, FrozenProtocol.read(path)) as run:
        pass
    kept = run.record["protocol"]
    assert kept["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert kept["family"] == ["+1", "-1"]


@pytest.mark.parametrize(
    ("design", "config", "said"),
    [
        (Design.of("sweep", {"eval": 12}, ("-1", "+1")), CONFIG, "questions.eval: 20, now 12"),
        (Design.of("sweep", {"ood": 20}, ("-1", "+1")), CONFIG, "eval: 20, now not set"),
        (Design.of("sweep", {"eval": 20}, ("+1",)), CONFIG, "family"),
        (Design.of("evaluate", {"eval": 20}, ("-1", "+1")), CONFIG, "command"),
        (Design.of("sweep", {"eval": 20}, ("-1", "+1"), 3), CONFIG, "seeds: 1, now 3"),
        (DESIGN, {**CONFIG, "trait": "kind"}, "trait: 'evil', now 'kind'"),
        (DESIGN, {"coefficients": [1]}, "no setting 'trait'"),
        (None, CONFIG, "cannot be held"),
    ],
)
def test_a_run_that_deviates_is_refused_before_it_leaves_a_trace(
    tmp_path, write, design, config, said
):
    with pytest.raises(UserError, match=said):
        start(tmp_path, FrozenProtocol.read(write()), design=design, config=config)
    assert not (tmp_path / "run").exists()


def test_what_is_known_of_a_run_is_held_before_the_rest(tmp_path, write):
    held = FrozenProtocol.read(write(settings={"trait": "evil", "dtype": "float32"}))
    output, known = Output(tmp_path / "run", protocol=held), {"trait": "evil"}
    planned = Planned("sweep", known, 0, design=DESIGN, later=("dtype",))
    planned.check(output)
    for changed, said in (
        ({"later": ()}, "no setting 'dtype'"),
        ({"config": {"trait": "kind"}}, "trait: 'evil', now 'kind'"),
        ({"design": Design.of("sweep", {"eval": 12}, ("-1", "+1"))}, "eval: 20, now 12"),
    ):
        with pytest.raises(UserError, match=said):
            dataclasses.replace(planned, **changed).check(output)
    assert not output.path.exists()


def test_nothing_is_pre_registered_afterwards(tmp_path, write):
    with start(tmp_path, None):
        pass
    with pytest.raises(UserError, match="protocol"):
        start(tmp_path, FrozenProtocol.read(write()))
    with start(tmp_path, FrozenProtocol.read(write()), overwrite=True):
        pass
    with pytest.raises(UserError, match="protocol"):
        start(tmp_path, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stopping": "never"}, "no field 'stopping'"),
        ({"units": None}, "does not say units"),
        ({"level": 0.9}, r"level: 0\.9, now 0\.95"),
        ({"test": "t"}, "test: 't', now 'sign-flip'"),
        ({"units": "answers"}, "units"),
        ({"correction": "none"}, "correction"),
        ({"command": "train"}, "command"),
        ({"questions": {}}, "needs questions"),
        ({"questions": {"eval": 0}}, "needs questions"),
        ({"questions": {"eval": "many"}}, "questions"),
        ({"seeds": 0}, "at least one seed"),
        ({"least_scored": 80}, "least_scored"),
        ({"family": [1, -1]}, "list of text"),
    ],
)
def test_a_file_is_read_strictly(write, changes, said):
    with pytest.raises(UserError, match=said):
        FrozenProtocol.read(write(**changes))


def test_several_seeds_are_units_and_so_are_data_sets():
    assert Design.of("compare", {"eval": 20}, (), 5).units == "questions and seeds"
    assert Design.of("predict-finetuning", {"evil": 20}, ()).units == "data sets"
    assert Design.of("compare-methods", {"held out": 24}, ()).units == "personas"
    assert Design.of("compare-methods", {"held out": 24}, (), 3).test == "two-way t"
    assert dataclasses.replace(DESIGN, family=()).test == "sign-flip"
