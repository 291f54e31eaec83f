"""What lies on a bound: the last value that is taken, and the first that is refused."""

from __future__ import annotations

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import BaseModel
from persona_lora.core.options import SearchOptions
from persona_lora.core.steering_vector import SteeringVector, _spans


@pytest.mark.parametrize(
    ("taken", "refused"),
    [({"max_iterations": 1}, {"max_iterations": 0}), ({"sigma0": 1e-9}, {"sigma0": 0.0})],
)
def test_a_search_needs_an_iteration_and_a_step(taken, refused):
    SearchOptions(**taken)
    with pytest.raises(UserError):
        SearchOptions(**refused)


@pytest.mark.parametrize("divisor", [2.0, 4.0, -0.5])
def test_a_vector_is_divided_as_its_numbers_are(divisor):
    vector = SteeringVector({0: torch.tensor([1.0, -3.0])}, BaseModel("tiny"), num_layers=1)
    assert torch.equal((vector / divisor).directions[0], vector.directions[0] / divisor)
    with pytest.raises(UserError, match="divided by 0"):
        vector / 0
    assert torch.equal((vector * divisor).directions[0], vector.directions[0] * divisor)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({3}, "3"),
        ({4, 3}, "3–4"),
        ({0, 1, 2, 3, 9, 11, 12}, "0–3, 9, 11–12"),
        ({0, 2, 4}, "0, 2, 4"),
    ],
)
def test_layers_are_named_in_spans(layers, said):
    assert _spans(layers) == f"layers {said}"
