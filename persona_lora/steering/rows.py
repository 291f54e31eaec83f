"""Coefficients by row: which row of a batch is steered how strongly.

Knows rows and coefficients; refuses to know what they scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persona_lora.core.errors import UserError
from persona_lora.core.given import items_of, whole_numbers
from persona_lora.core.lora_diff import finite_coefficient

Coefficients = float | Sequence[float] | Sequence[Sequence[float]]


class RowCoefficients:
    """Coefficients ``[rows, K]`` of everything to be generated, and those of the current batch.

    A single row of coefficients serves every batch; with several, ``choose`` must name the rows
    of a batch before it runs. One number stands for all terms, a flat list for a single row.
    """

    def __init__(self, coefficients: Coefficients, num_terms: int) -> None:
        rows = [
            [finite_coefficient(value) for value in row] for row in _by_row(coefficients, num_terms)
        ]
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
        if len(self.all) == 1:
            return
        chosen = whole_numbers(rows, "rows")
        outside = [row for row in chosen if not 0 <= row < len(self.all)]
        if outside:
            raise UserError(
                f"row {outside[0]} has no coefficients; the steerer holds those of rows "
                f"0–{len(self.all) - 1}, give one for each conversation"
            )
        self.chosen = self.all[chosen]

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


def _by_row(coefficients: Any, num_terms: int) -> list[list[Any]]:
    """Return coefficients as ``[rows, K]``, not yet checked."""
    rows = items_of(coefficients)
    if rows is None:
        return [[coefficients] * num_terms]
    lists = [items_of(row) for row in rows]
    if rows and all(each is None for each in lists):
        return [rows]
    return [[row] if each is None else each for row, each in zip(rows, lists, strict=True)]
