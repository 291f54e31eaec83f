"""Live LoRA: diffs held beside the weights, with a coefficient vector for every batch row.

The K diffs of a module are concatenated into one basis, and the output becomes

    y = Wx + B·((A·x) ∘ S[row]),    A [R, in], B [out, R], S [rows, R],

with R the summed rank and S the row's coefficient repeated over each diff's rank. One batched
generation thus answers for many coefficient settings at once. W is never touched, so this works
on frozen, quantised and tied weights and there is nothing to restore; it stays valid with a KV
cache as long as a row keeps its coefficients, which it does within one generation.

Modules that read the same input (q, k, v; gate, up) share one product A·x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, shared_base_model
from persona_lora.models.caches import states_read
from persona_lora.models.hooks import Hook
from persona_lora.models.structure import decoder_layers, input_groups, weight_of
from persona_lora.steering.placement import check_base_model, find_modules
from persona_lora.steering.rows import RowCoefficients
from persona_lora.steering.steerer import Steerer


class LiveLoRA(Steerer):
    """Context manager: adds diffs to the outputs of linear modules, with coefficients per row.

    ``coefficients`` is ``[rows, K]``: one vector over the K ``diffs`` for every row that will be
    generated. With a single row of coefficients every batch row gets the same. With several,
    ``select_rows`` must name the rows of a batch before it runs: pass it as ``prepare_batch`` to
    ``generate_answers``. A row of zeros gives the bits of the unsteered model.
    """

    def __init__(
        self,
        model: nn.Module,
        diffs: Sequence[LoRADiff],
        coefficients: Sequence[Sequence[float]],
        *,
        allow_other_base: bool = False,
    ) -> None:
        if not diffs:
            raise UserError("live LoRA needs at least one diff")
        super().__init__(model)
        self.model = model
        self.diffs = list(diffs)
        rows = RowCoefficients(coefficients, len(self.diffs))
        shared_base_model(self.diffs)
        check_base_model(model, self.diffs, allow_other_base=allow_other_base)
        self._modules = {
            name: module
            for diff in self.diffs
            for name, module in find_modules(model, diff).items()
        }
        self._selection = _Selection(rows)

    def hooks(self) -> list[Hook]:
        """Return a hook on every module of the diffs; the factors go where the modules are."""
        first = decoder_layers(self.model)[0]
        hooks = [Hook(first, self._selection.note_pass, "block 0", before=True)]
        for members in input_groups(self._modules):
            modules = {name: self._modules[name] for name in members}
            group = _SharedInput(modules, self.diffs, self._selection)
            hooks += [Hook(modules[name], _AddDelta(group, name), name) for name in members]
        return hooks

    def select_rows(self, rows: Sequence[int]) -> None:
        """Say which rows of ``coefficients`` the next batch consists of, in its order."""
        self._selection.choose(rows)


class _Selection:
    """The coefficients of the current batch, expanded once for each layout and device."""

    def __init__(self, rows: RowCoefficients) -> None:
        self.rows = rows
        self._expanded: dict[tuple[tuple[int, ...], torch.device, int], Tensor] = {}
        self._length = 0  # tokens of a row in the pass that runs

    def choose(self, rows: Sequence[int]) -> None:
        self.rows.choose(rows)
        self._expanded.clear()

    def note_pass(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Note, before the first block runs, how many tokens the rows have."""
        self._length = states_read(arguments, keywords).shape[1]

    def scale(self, columns: tuple[int, ...], inputs: Tensor) -> Tensor:
        """Return S for a basis whose column j belongs to diff columns[j], to multiply A·x with.

        ``[R]`` where all rows have the same, else ``[batch, 1, …, R]``, or ``[batch · seq, R]`` for
        a module that sees all tokens in one list. Raises UserError where tokens cannot be told
        apart.
        """
        layout = inputs.ndim if inputs.ndim > 2 else -self._length
        key = (columns, inputs.device, layout)
        if len(self.rows.chosen) > 1:
            self._check_rows(inputs)
        if key not in self._expanded:
            chosen = self.rows.chosen[:, list(columns)].to(inputs.device)
            if len(chosen) == 1:
                self._expanded[key] = chosen[0]
            elif layout > 0:
                self._expanded[key] = chosen.view(len(chosen), *[1] * (layout - 2), -1)
            else:
                self._expanded[key] = chosen.repeat_interleave(self._length, dim=0)
        return self._expanded[key]

    def _check_rows(self, inputs: Tensor) -> None:
        if inputs.ndim > 2:
            self.rows.of_batch(inputs.shape[0])
        elif inputs.shape[0] != len(self.rows.chosen) * self._length:
            raise UserError(
                f"a module reads {list(inputs.shape)} for {len(self.rows.chosen)} rows of "
                f"{self._length} tokens, and which token belongs to which row cannot be told; "
                "merge the diff instead (LoRASteerer, --mode merged)"
            )


_NOTHING = torch.empty(0)


class _SharedInput:
    """The stacked A factors of modules that read one input, and their product with it."""

    def __init__(
        self, modules: dict[str, nn.Module], diffs: Sequence[LoRADiff], selection: _Selection
    ) -> None:
        self.selection = selection
        self.up: dict[str, Tensor] = {}  # Bᵀ, [R of the module, out]
        self.span: dict[str, slice] = {}
        self._served: set[str] = set()
        self._input = self._product = _NOTHING
        down: list[Tensor] = []
        columns: list[int] = []
        for name, module in modules.items():
            B, start = [], len(columns)
            for index, diff in enumerate(diffs):
                if name in diff.factors:
                    factors = diff.factors[name]
                    down.append(factors.A)
                    B.append(factors.B)
                    columns += [index] * factors.rank
            self.span[name] = slice(start, len(columns))
            self.up[name] = _placed(torch.cat(B, dim=1).T, module)
        self.columns = tuple(columns)
        self.down = _placed(torch.cat(down), next(iter(modules.values())))  # [R, in]

    def product(self, name: str, inputs: Tensor) -> Tensor:
        """Return (A·x) ∘ S for one member; computed once for all members of the group."""
        if inputs is not self._input or name in self._served:
            scale = self.selection.scale(self.columns, inputs)
            down = self.down.to(inputs.device)  # an offloaded module's weights come and go
            product = functional.linear(inputs.to(down.dtype), down)
            if torch.is_grad_enabled():
                product = (product * scale).to(down.dtype)
            else:
                product.mul_(scale)  # in fp32, rounded once
            self._input, self._product = inputs, product
            self._served.clear()
        self._served.add(name)
        span = self._product[..., self.span[name]]
        if len(self._served) == len(self.span):  # the last member: let the tensors go
            self._input = self._product = _NOTHING
            self._served.clear()
        return span


class _AddDelta:
    """The forward hook of one module: output + B·((A·x) ∘ S)."""

    def __init__(self, group: _SharedInput, name: str) -> None:
        self.group = group
        self.name = name

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        product = self.group.product(self.name, arguments[0])
        up = self.group.up[self.name].to(output.device)
        if torch.is_grad_enabled() or output.dtype != up.dtype or not output.is_contiguous():
            return output + (product @ up).to(output.dtype)
        # In place: the output is fresh from the module and belongs to nobody else yet.
        output.view(-1, output.shape[-1]).addmm_(product.flatten(0, -2), up)
        return output


def _placed(factor: Tensor, module: nn.Module) -> Tensor:
    """Return a factor on the module's device, in its dtype where that is a plain float.

    On the CPU for an offloaded module, whose weights have no device between passes.
    """
    weight = weight_of(module)
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    return factor.to(device, dtype).contiguous()
