"""Pictures of vectors and finetunes: drawn from rows on disk, the same bytes each time."""

from __future__ import annotations

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.runs import Output, Run
from persona_lora.core.steering_vector import SteeringVector
from persona_lora.studies.drift.figure import render_checkpoints, render_cross_persona
from persona_lora.studies.report_page import write_report
from persona_lora.studies.vectors.figure import (
    render_cosines,
    render_separation,
    render_vectors_over_layers,
)

PNG = b"\x89PNG"


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return {
        name: SteeringVector(
            {layer: torch.randn(8, generator=generator) for layer in range(4)},
            BaseModel("tiny"),
            num_layers=4,
            trait=name,
            sources={"pairs": 5, "explained": {str(layer): 0.4 for layer in range(4)}},
        )
        for name in ("evil", "sycophancy", "a_rather_long_name_of_a_variant_2")
    }


@pytest.fixture
def finetune(tmp_path):
    def make(tuned="evil", steps=(0, 5, 10, 15), traits=("evil", "sycophancy"), named=True):
        config = {"finetuned_on": tuned if named else None}
        run = Run.open(
            Output(tmp_path / tuned, overwrite=True),
            command="evaluate-checkpoints",
            config=config,
            seed=0,
        )
        rows = []
        for trait in traits:
            for k, step in enumerate(steps):
                base = {"checkpoint": str(step), "step": step, "trait": trait, "type": None}
                score = {**base, "vector": None, "layer": None}
                value = None if step == 10 else 20.0 * k
                bounds = {"low": value, "high": value}
                rows.append({**score, "statistic": "trait", "value": value, **bounds})
                rows.append(
                    {**score, "statistic": "coherence", "value": 80.0, "low": 70.0, "high": 90.0}
                )
                for name in ("evil_response_avg", "sycophancy_response_avg"):
                    where = {**base, "vector": name, "layer": 2, "low": k - 0.2, "high": k + 0.2}
                    rows.append({**where, "statistic": "projection", "value": float(k)})
                    rows.append({**where, "statistic": "shift", "value": float(k)})
        run.write("checkpoints", rows)
        pair = {"vector": "evil_response_avg", "other": "sycophancy_response_avg", "layer": 2}
        run.write("cosines", [{**pair, "cosine": 0.25}])
        return run

    return make


def test_vectors_are_drawn(vectors, tmp_path):
    drawn = render_cosines(vectors, 2).save(tmp_path / "cosines.png")
    assert drawn.startswith(PNG)
    assert (tmp_path / "cosines.png").read_bytes() == drawn
    assert render_cosines(vectors, 2).png() == drawn
    assert render_cosines(vectors, 1).png() != drawn
    assert render_vectors_over_layers(vectors).png().startswith(PNG)


def test_one_vector_has_no_cosines_and_a_layer_must_be_there(vectors):
    with pytest.raises(UserError, match="at least two"):
        render_cosines({"evil": vectors["evil"]}, 2)
    with pytest.raises(UserError, match="no layer 9"):
        render_cosines(vectors, 9)
    with pytest.raises(UserError, match="no vector"):
        render_vectors_over_layers({})
    assert render_vectors_over_layers({"e": vectors["evil"]}).png().startswith(PNG)


@pytest.mark.parametrize("steps", [(0, 5, 10, 15), (0,)])
def test_a_finetune_is_drawn_whatever_is_missing(finetune, steps):
    assert render_checkpoints(finetune(steps=steps)).png().startswith(PNG)


def test_cross_persona_is_drawn(finetune):
    runs = [finetune("evil"), finetune("sycophancy")]
    assert render_cross_persona(runs).png().startswith(PNG)


def test_cross_persona_says_when_there_is_nothing(finetune):
    with pytest.raises(UserError, match="no finetune was judged on another trait"):
        render_cross_persona([finetune("evil", traits=("evil",))])


def separation(layer, auc=0.7):
    place = {"trait": "evil", "vector": "evil", "type": "response_avg", "layer": layer}
    counts = {"n_positive": 9, "n_negative": 8, "n": 20}
    return {**place, "auc": auc, "low": auc - 0.1, "high": auc + 0.1, "rho": 0.4, **counts}


def test_separation_is_drawn_over_layers():
    assert render_separation([separation(0), separation(1, 0.9)]).png().startswith(PNG)
    with pytest.raises(UserError, match="no rows"):
        render_separation([])


def test_one_page_shows_runs_of_every_kind(vectors, finetune, tmp_path):
    extract = Run.open(
        tmp_path / "extract",
        command="extract",
        config={"trait": "evil", "variant": None, "source": "answers", "model": "tiny"},
        seed=0,
    )
    for name, vector in vectors.items():
        vector.save(extract.folder / f"{name}.safetensors")
    project = Run.open(
        tmp_path / "project",
        command="project",
        config={"model": "tiny", "source": "a.csv"},
        seed=0,
    )
    row = {"vector": "evil", "trait": "evil", "layer": 1, "type": "response_avg"}
    project.write(
        "projections",
        [
            {"row": i, **row, "projection": i / 2, "base_projection": 0.0, "shift": i / 2}
            for i in range(3)
        ],
    )
    project.write("separation", [separation(0), separation(1, 0.9)])
    folders = [run.folder for run in (extract, project, finetune("evil"))]
    page = write_report(folders, tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 + 1 + 1
    assert "Evil: steering vectors" in page
    assert "best at layer 1 (AUC 0.90 [0.80, 1.00]), the best of 2 tried" in page
    assert "A finetune on evil, checkpoint by checkpoint" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_several_finetunes_get_a_picture_of_what_they_do_to_other_traits(finetune, tmp_path):
    runs = [finetune("evil"), finetune("sycophancy")]
    one = write_report([runs[0].folder], tmp_path / "one.html").read_text()
    both = write_report([run.folder for run in runs], tmp_path / "both.html").read_text()
    assert one.count("data:image/png;base64,") == 1
    assert both.count("data:image/png;base64,") == 3


def test_a_run_without_its_rows_is_named(tmp_path):
    for command, message in (
        ("extract", "holds no vectors"),
        ("project", "holds no projections"),
        ("evaluate-checkpoints", "no rows of checkpoints"),
        ("dance", "a run of 'dance'"),
    ):
        config = {"trait": "evil", "variant": None, "source": "x", "model": "tiny"}
        run = Run.open(tmp_path / command, command=command, config=config, seed=0)
        with pytest.raises(UserError, match=message):
            write_report(run.folder, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
