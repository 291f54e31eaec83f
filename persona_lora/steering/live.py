"""Live LoRA: diffs held beside the weights, with a coefficient vector for every batch row.

The K diffs of a module are concatenated into one basis, and the output becomes

    y = Wx + B·((A·x) ∘ S[row]),    A [R, in], B [out, R], S [rows, R],

with R the summed rank and S the row's coefficient repeated over each diff's rank. One batched
generation thus answers for many coefficient settings at once. W is never touched, so this works
on frozen, quantised and tied weights and there is nothing to restore; it stays valid with a KV
cache as long as a row keeps its coefficients, which it does within one generation.

Modules that read the same input (q, k, v; gate, up) share one product A·x, and equal A are held
once: A·x of diffs on one basis costs what one of them does. Where the rows that are steered alike
stand together, such a module mixes its B first, once for each kind of row,

    y = Wx + (Σ c[row, k] ΔBₖ)·(A·x),

of the rank of one diff whatever their number; one diff that all rows share alike does the same.

On a CPU every product in half precision costs more to begin than a small one to make: a few tokens
are multiplied in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from persona_lora.core.errors import UserError
from persona_lora.core.given import several
from persona_lora.core.lora_diff import LoRADiff, as_diff, shared_base_model
from persona_lora.models.caches import states_read
from persona_lora.models.hooks import Hook
from persona_lora.models.structure import computed_in, decoder_layers, input_groups, weight_of
from persona_lora.steering.placement import check_base_model, find_modules
from persona_lora.steering.rows import Coefficients, RowCoefficients
from persona_lora.steering.steerer import Steerer


class LiveLoRA(Steerer):
    """Context manager: adds diffs to the outputs of linear modules, with coefficients per row.

    ``diffs`` are one or several, themselves or by path. ``coefficients`` is ``[rows, K]``: one
    vector over the K ``diffs`` for every row that will be generated. With a single row of
    coefficients (a flat list is one) every batch row gets the same. With several,
    ``select_rows`` must name the rows of a batch before it runs: pass it as ``prepare_batch`` to
    ``generate_answers``. A row of zeros gives the bits of the unsteered model.
    """

    def __init__(
        self,
        model: nn.Module,
        diffs: LoRADiff | str | Path | Iterable[LoRADiff | str | Path],
        coefficients: Coefficients,
        *,
        allow_other_base: bool = False,
    ) -> None:
        super().__init__(model)
        self.model = model
        self.diffs = [as_diff(each) for each in several(diffs)]
        if not self.diffs:
            raise UserError("live LoRA needs at least one diff")
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

    def set_rows(self, coefficients: Coefficients) -> None:
        """Go on with other rows of coefficients, ``[rows, K]``: the next batch's, in its order."""
        self._selection.rows = RowCoefficients(coefficients, len(self.diffs))
        self._selection.forget()

    def rows_apart(self) -> int:
        """Return how many rows of coefficients there are."""
        return len(self._selection.rows.all)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Say which rows of ``coefficients`` the next batch consists of, in its order."""
        self._selection.choose(rows)

    def keep_rows(self, places: Sequence[int]) -> None:
        """Go on with some rows of the batch, by their places in it."""
        self._selection.keep(places)


ROWS_TOGETHER = 4  # rows of a kind, on the mean, from which mixing B first is less work
FEW = 256  # numbers of A·x, for one module, up to which fp32 takes less time on a CPU


class _Runs(NamedTuple):
    """Rows of a batch that stand together and are steered alike: ``[runs, K]``, rows of each."""

    coefficients: Tensor
    counts: list[int]
    equal: bool  # in length

    def flat(self, product: Tensor) -> Tensor:
        """Return A·x as ``[runs, tokens, R]`` where runs are equally long, else ``[tokens, R]``."""
        shape = (len(self.counts), -1) if self.equal else (-1,)
        return product.view(*shape, product.shape[-1])


class _Selection:
    """The coefficients of the current batch, expanded once for each layout and device."""

    def __init__(self, rows: RowCoefficients) -> None:
        self.rows = rows
        self._expanded: dict[tuple[tuple[int, ...], torch.device, int], Tensor] = {}
        self._runs: _Runs | None = None
        self._length = 0  # tokens of a row in the pass that runs

    def choose(self, rows: Sequence[int]) -> None:
        self.rows.choose(rows)
        self.forget()

    def forget(self) -> None:
        """Drop what was made of the rows before these."""
        self._expanded.clear()
        self._runs = None

    def check_rows(self, inputs: Tensor, *, routed: bool) -> None:
        """Raise UserError where it cannot be told which row a token of a module's input is of.

        What a router hands to one of its modules may be in any order, whatever its number.
        """
        rows = len(self.rows.chosen)
        if rows > 1 and inputs.ndim > 2:
            self.rows.of_batch(inputs.shape[0])
        elif rows > 1 and (routed or inputs.shape[0] != rows * self._length):
            raise UserError(
                f"a module reads {list(inputs.shape)} for {rows} rows of {self._length} tokens, "
                "and which token belongs to which row cannot be told; merge the diff instead "
                "(LoRASteerer, --mode merged)"
            )

    def runs(self, several: bool) -> _Runs | None:
        """Return the runs of the batch, or None where they are too short to be worth it.

        One run always is; more of them where there are several diffs to mix.
        """
        if self._runs is None:
            found = torch.unique_consecutive(self.rows.chosen, dim=0, return_counts=True)
            counts = found[1].tolist()
            self._runs = _Runs(found[0], counts, len(set(counts)) == 1)
        number, rows = len(self._runs.counts), len(self.rows.chosen)
        worth = number == 1 or (several and number * ROWS_TOGETHER <= rows)
        return self._runs if worth else None

    def keep(self, places: Sequence[int]) -> None:
        self.rows.keep(places)
        self.forget()

    def note_pass(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Note, before the first block runs, how many tokens the rows have."""
        self._length = states_read(arguments, keywords).shape[1]

    def scale(self, columns: tuple[int, ...], inputs: Tensor) -> Tensor:
        """Return S for a basis whose column j belongs to diff columns[j], to multiply A·x with.

        ``[R]`` where all rows have the same, else ``[batch, 1, …, R]``, or ``[batch · seq, R]`` for
        a module that sees all tokens in one list.
        """
        layout = inputs.ndim if inputs.ndim > 2 else -self._length
        key = (columns, inputs.device, layout)
        if key not in self._expanded:
            chosen = self.rows.chosen[:, list(columns)].to(inputs.device)
            if len(chosen) == 1:
                self._expanded[key] = chosen[0]
            elif layout > 0:
                self._expanded[key] = chosen.view(len(chosen), *[1] * (layout - 2), -1)
            else:
                self._expanded[key] = chosen.repeat_interleave(self._length, dim=0)
        return self._expanded[key]


_NOTHING = torch.empty(0)


class _Stack:
    """Different A by their first row in a stack: an equal one is held once."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        self.rank = 0

    def place(self, A: Tensor) -> int:
        """Return the row at which A begins, at the end where it is new."""
        for start, each in self.held.items():
            if torch.equal(each, A):
                return start
        self.held[self.rank] = A
        self.rank += len(A)
        return self.rank - len(A)


class _Factor:
    """A factor on its module's device, in the dtype of its weights, bf16 for quantised ones.

    On a CPU in fp32, and in that dtype too once many tokens have come. There also for an offloaded
    module, whose weights come and go.
    """

    def __init__(self, factor: Tensor, module: nn.Module) -> None:
        weight = weight_of(module)
        self.dtype = computed_in(weight)
        self.whole = torch.promote_types(self.dtype, torch.float32)
        on_cpu = weight.device.type in ("cpu", "meta")
        device, dtype = ("cpu", self.whole) if on_cpu else (weight.device, self.dtype)
        self.held = factor.to(device, dtype).contiguous()
        self._cast = _NOTHING

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the factor there; what is only rounded is kept."""
        if device != self.held.device or dtype == self.held.dtype:
            return self.held.to(device, dtype)
        if self._cast is _NOTHING or self._cast.dtype != dtype:
            with torch.inference_mode(mode=False):  # a later pass may need gradients through it
                self._cast = self.held.to(dtype)
        return self._cast


class _Member:
    """The factors of one module: where its A lie in the group's stack, and its B of all diffs."""

    def __init__(
        self, name: str, module: nn.Module, diffs: Sequence[LoRADiff], stack: _Stack
    ) -> None:
        held = [(at, diff.factors[name]) for at, diff in enumerate(diffs) if name in diff.factors]
        starts = [stack.place(factors.A) for _, factors in held]
        ranks = [factors.rank for _, factors in held]
        self.indices = [at for at, _ in held]
        self.columns = [at for at, factors in held for _ in range(factors.rank)]
        self.rows = [
            start + row for start, rank in zip(starts, ranks, strict=True) for row in range(rank)
        ]
        self.basis = slice(starts[0], starts[0] + ranks[0]) if len(set(starts)) == 1 else None
        up = torch.cat([factors.B for _, factors in held], dim=1).T
        self.up = _Factor(up, module)  # [R, out]
        self._mixed_of = self._mixed = _NOTHING

    def mixed(self, coefficients: Tensor, like: Tensor) -> Tensor:
        """Return Σ cₖ ΔBₖᵀ for every row of coefficients, ``[runs, rank, out]``, on a basis.

        On the device and in the dtype of ``like``.
        """
        if coefficients is not self._mixed_of or self._mixed.dtype != like.dtype:
            chosen = coefficients[:, self.indices].to(like.device)
            up = self.up.held.to(like.device)
            bank = up.view(len(self.indices), -1).float()
            self._mixed = (chosen @ bank).to(like.dtype).view(len(chosen), -1, up.shape[1])
            self._mixed_of = coefficients
        return self._mixed


class _SharedInput:
    """The A factors of modules that read one input, and their product with it."""

    def __init__(
        self, modules: dict[str, nn.Module], diffs: Sequence[LoRADiff], selection: _Selection
    ) -> None:
        self.selection = selection
        # One of several in a block (experts.3): it reads what a router hands to it.
        self.routed = any(len(re.findall(r"\.\d+(?=\.|$)", name)) > 1 for name in modules)
        stack = _Stack()
        self.members = {
            name: _Member(name, module, diffs, stack) for name, module in modules.items()
        }
        members = self.members.values()
        self.several = any(len(member.indices) > 1 for member in members)
        self.on_basis = all(member.basis is not None for member in members)
        self._served: set[str] = set()
        self._input = self._product = _NOTHING
        self._runs: _Runs | None = None
        self.columns = tuple(each for member in self.members.values() for each in member.columns)
        rows = [row for member in self.members.values() for row in member.rows]
        self.spread = None if rows == [*range(stack.rank)] else torch.tensor(rows)
        self.rank = stack.rank
        self.down = _Factor(torch.cat([*stack.held.values()]), next(iter(modules.values())))
        ends = accumulate(len(member.columns) for member in self.members.values())
        self.span = {
            name: slice(end - len(member.columns), end)
            for (name, member), end in zip(self.members.items(), ends, strict=True)
        }

    def product(self, name: str, inputs: Tensor) -> tuple[Tensor, _Runs | None]:
        """Return (A·x) ∘ S for one member, or A·x and the runs that have a mixed B of their own.

        Computed once for all members of the group.
        """
        if inputs is not self._input or name in self._served:
            self._multiply(inputs)
        self._served.add(name)
        basis = self.members[name].basis if self._runs is not None else None
        part, runs = self._product[..., basis or self.span[name]], self._runs
        if len(self._served) == len(self.span):  # the last member: let the tensors go
            self._input = self._product = _NOTHING
            self._served.clear()
        return part, runs

    def _multiply(self, inputs: Tensor) -> None:
        few = inputs.numel() // inputs.shape[-1] * self.rank <= FEW * len(self.members)
        dtype = self.down.whole if few and inputs.is_cpu else self.down.dtype
        down = self.down.on(inputs.device, dtype)
        product = functional.linear(inputs.to(down.dtype), down)
        whole = torch.is_grad_enabled()
        mixes = self.on_basis and not whole
        self._runs = self.selection.runs(self.several) if mixes else None
        if self._runs is None or len(self._runs.counts) > 1:
            self.selection.check_rows(inputs, routed=self.routed)
        if self._runs is not None:
            product = self._runs.flat(product)
        else:
            scale = self.selection.scale(self.columns, inputs)
            if self.spread is not None:
                product = product[..., self.spread.to(product.device)]
            # In fp32, rounded once.
            product = (product * scale).to(down.dtype) if whole else product.mul_(scale)
        self._input, self._product = inputs, product
        self._served.clear()


class _AddDelta:
    """The forward hook of one module: output + B·((A·x) ∘ S), or output + (Σ c ΔB)·(A·x)."""

    def __init__(self, group: _SharedInput, name: str) -> None:
        self.group = group
        self.name = name

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        product, runs = self.group.product(self.name, arguments[0])
        member = self.group.members[self.name]
        if runs is not None:
            return _with_runs(output, product, member.mixed(runs.coefficients, product), runs)
        return _plus(output, product, member.up.on(product.device, product.dtype))


def _plus(output: Tensor, product: Tensor, up: Tensor) -> Tensor:
    """Return the output with product·up added, in place where that can be."""
    states = product.flatten(0, -2)
    if torch.is_grad_enabled() or not output.is_contiguous():
        return output + (states @ up).to(output.dtype).view(output.shape)
    # In place: the output is fresh from the module and belongs to nobody else yet.
    rows = output.view(-1, output.shape[-1])
    if output.dtype == up.dtype:
        rows.addmm_(states, up)
    else:
        rows.add_(states.mm(up))  # in the wider dtype, rounded once
    return output


def _with_runs(output: Tensor, product: Tensor, mixed: Tensor, runs: _Runs) -> Tensor:
    """Return the output with each run's own mixed B times its rows of A·x added, in place."""
    if len(mixed) == 1:
        return _plus(output, product, mixed[0])
    fits = output.dtype == mixed.dtype and output.is_contiguous()
    whole = output if fits else torch.zeros_like(output, dtype=mixed.dtype).contiguous()
    if runs.equal:
        whole.view(*product.shape[:-1], -1).baddbmm_(product, mixed)
    else:
        sizes = [count * (len(product) // sum(runs.counts)) for count in runs.counts]
        rows = whole.view(len(product), -1).split(sizes), product.split(sizes)
        for part, states, up in zip(*rows, mixed, strict=True):
            part.addmm_(states, up)
    return whole if fits else output + whole.to(output.dtype)
