"""Coefficients by row: which row of a batch is steered how strongly.

Knows rows and coefficients; refuses to know what they scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import finite_coefficient


class RowCoefficients:
    """Coefficients ``[rows, K]`` of everything to be generated, and those of the current batch.

    A single row of coefficients serves every batch; with several, ``choose`` must name the rows
    of a batch before it runs.
    """

    def __init__(self, coefficients: Sequence[Sequence[float]], num_terms: int) -> None:
        rows = [[finite_coefficient(value) for value in row] for row in coefficients]
        if not rows or any(len(row) != num_terms for row in rows):
            lengths = sorted({len(row) for row in rows})
            raise UserError(
                f"coefficients must be [rows, {num_terms}], one value for each direction; "
                f"got {len(rows)} rows of lengths {lengths}"
            )
        self.all = torch.tensor(rows, dtype=torch.float32)  # [rows, K]
        self.chosen = self.all  # [batch, K]

    def choose(self, rows: Sequence[int]) -> None:
        """Say which rows the next batch consists of, in its order."""
        self.chosen = self.all[list(rows)] if len(self.all) > 1 else self.all

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some rows of the batch, by their places in it, in this order."""
        self.chosen = self.chosen[list(places)] if len(self.all) > 1 else self.all

    def of_batch(self, batch: int) -> Tensor:
        """Return the current coefficients ``[batch or 1, K]``; UserError for another batch size."""
        if len(self.chosen) not in (1, batch):
            raise UserError(
                f"the steerer holds coefficients for {len(self.chosen)} rows, the batch has "
                f"{batch}; call select_rows with the rows of each batch"
            )
        return self.chosen
