"""How far a finetune moved the weights along trait directions: ⟨ΔW, L⟩ with ΔW = W − W₀.

For every module ⟨ΔW, BA⟩ = Σ (BᵀΔW) ∘ A, so that no direction is ever formed. Both models are
read a block of rows at a time and all K directions are projected on in one pass, in float64: the
memory needed is that of a block and of one module's factors (diffs opened ``on_disk``), whatever
the models' size. A finetune that is an adapter itself needs no weights at all:
⟨B₁A₁, B₂A₂⟩ = tr((B₂ᵀB₁)(A₁A₂ᵀ)).

With ``inputs`` everything is weighted by what flows through the modules, ⟨ΔW, L⟩_Σ (``inputs``):
plain projections of LoRAs speak of the seed that their training began from. With ``control``, what
another finetune did is taken off ΔW first: all short finetunes have much in common.

The null is a direction of the same A and the same singular values whose outputs are turned at
random: QBA with Q uniform on the orthogonal matrices. It has the coordinate's variance
‖L Σ ΔWᵀ‖² / out in each module. (A random A as well would be no null for adapters that began from
one seed: their A are alike whatever they were trained on.)

Refuses to know what the traits mean; a projection predicts, it does not prove.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from persona_lora.core import progress
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff, LoRAFactors, as_diff, layer_number
from persona_lora.models.structure import kind_of
from persona_lora.models.weight_files import WeightSource, weights_of
from persona_lora.projections.common_weights import common_weights
from persona_lora.projections.inputs import ModuleInputs
from persona_lora.report.scores import grouped

BLOCK_NUMBERS = 4_000_000  # weights of one block, of either model
EXPONENT_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
Array = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class ModuleProjection:
    """The sums of one module that the diffs touch.

    ``inner`` and ``diff_square`` are ⟨ΔW, Lₖ⟩ and ‖Lₖ‖² (K numbers), ``delta_square`` is ‖ΔW‖².
    ``null_square`` and ``rounding_square`` are the variances of ``inner`` over directions turned at
    random, and over roundings of the finetuned weights to their stored type (K numbers).
    """

    module: str
    layer: int | None
    delta_square: float
    inner: tuple[float, ...]
    diff_square: tuple[float, ...]
    null_square: tuple[float, ...]
    rounding_square: tuple[float, ...]


@dataclass(frozen=True)
class Projection:
    """The projection of ΔW (or of a part of it) on one direction.

    ``inner`` = ⟨ΔW, L⟩; ``coordinate`` = ⟨ΔW, L⟩ / ‖L‖, in units of weight; ``cosine`` =
    ⟨ΔW, L⟩ / (‖ΔW‖‖L‖) with ΔW over all weights (of the part), also those that no diff touches, so
    that it does not depend on what other diffs stand beside. ``null_sd`` is the standard deviation
    of the coordinate over directions of the same A and spectrum in every module, ``p`` two-sided
    against them (None where ΔW is zero), ``rounding_sd`` that of the coordinate by rounding alone.
    """

    inner: float
    coordinate: float
    cosine: float
    null_sd: float
    p: float | None
    rounding_sd: float


@dataclass(frozen=True)
class WeightProjection:
    """The projections of one finetune on K directions; see the module for what they are.

    ``others`` are ‖ΔW‖² of the weights that no diff touches, by module (weighted: of those of them
    whose inputs are known); ``left_out`` names what only one of the models holds.
    """

    names: tuple[str, ...]
    modules: tuple[ModuleProjection, ...]
    gram: Array  # [K, K], ⟨Lᵢ, Lⱼ⟩
    others: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = field(default_factory=tuple)

    @property
    def other_square(self) -> float:
        """‖ΔW‖² over weights that no diff touches."""
        return math.fsum(self.others.values())

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖ over all weights."""
        return math.sqrt(math.fsum(m.delta_square for m in self.modules) + self.other_square)

    @cached_property
    def total(self) -> dict[str, Projection]:
        """The projection on every direction over all modules."""
        return self._projections(self.modules, self.others.values())

    def by_layer(self) -> dict[int, dict[str, Projection]]:
        """Return the projections of each decoder layer; a cosine is within the whole layer."""
        layers = self._parts(layer_number)
        return {
            layer: layers[layer] for layer in sorted(each for each in layers if each is not None)
        }

    def by_kind(self) -> dict[str, dict[str, Projection]]:
        """Return the projections of each kind of module (q_proj, down_proj, …) in all layers."""
        return self._parts(kind_of)

    def shares(self) -> list[tuple[str, int | str, float]]:
        """Return (part, of, share of ‖ΔW‖²) of every layer and of every kind of module.

        Whether a diff touches it or not; what lies in no layer is "elsewhere". Empty for ΔW = 0.
        """
        squares = defaultdict[tuple[str, int | str], float](float)
        touched = ((each.module, each.delta_square) for each in self.modules)
        for module, square in (*touched, *self.others.items()):
            layer = layer_number(module)
            squares["layer", "elsewhere" if layer is None else layer] += square
            squares["kind", kind_of(module)] += square
        whole = self.delta_norm**2
        return [(*place, each / whole) for place, each in squares.items() if each]

    @cached_property
    def corrected(self) -> dict[str, float]:
        """The coefficients c that minimise ‖ΔW − Σ cₖLₖ‖: directions are not orthogonal.

        G c = (⟨ΔW, Lₖ⟩)ₖ with G the Gram matrix; solved by least squares, so that directions that
        depend on each other share.
        """
        inner = np.array([self.total[name].inner for name in self.names])
        solved = np.linalg.lstsq(self.gram, inner, rcond=1e-10)[0]
        return {name: float(value) for name, value in zip(self.names, solved, strict=True)}

    @property
    def explained(self) -> float | None:
        """The share of ‖ΔW‖² that the best mix of all directions explains; None for ΔW = 0."""
        if self.delta_norm == 0:
            return None
        inner = math.fsum(self.corrected[name] * self.total[name].inner for name in self.names)
        return inner / self.delta_norm**2

    def _parts(self, part: Callable[[str], K]) -> dict[K, dict[str, Projection]]:
        """Return the projections of every part that a diff touches, of all that the part holds."""
        others = grouped(self.others, part)
        return {
            name: self._projections(own, [self.others[each] for each in others.get(name, ())])
            for name, own in grouped(self.modules, lambda each: part(each.module)).items()
        }

    def _projections(
        self, modules: Sequence[ModuleProjection], others: Iterable[float]
    ) -> dict[str, Projection]:
        delta = math.sqrt(math.fsum([*(m.delta_square for m in modules), *others]))
        return {name: _projection(modules, index, delta) for index, name in enumerate(self.names)}


def project_weights(
    original: WeightSource,
    finetuned: WeightSource,
    diffs: Mapping[str, LoRADiff],
    *,
    inputs: ModuleInputs | None = None,
    control: LoRADiff | None = None,
    block_numbers: int = BLOCK_NUMBERS,
) -> WeightProjection:
    """Project the change between two models on every diff, in one pass over their weights.

    ``inputs`` weighs it, ``control`` is taken off it. Progress counts weights. Harmless differences
    are left out and named (``common_weights``). Raises UserError when the models do not hold the
    same tensors (the first ones that differ are named), or when a diff or the control has a module
    that they lack, or of another shape.
    """
    touched = _modules_of(diffs, inputs)
    common = common_weights(original, finetuned, touched)
    taken_off = {} if control is None else _modules_of({"the control": control}, inputs)
    for source in (original, finetuned):
        _check_modules(touched, source)
        _check_modules(taken_off, source)
    gram = np.zeros((len(diffs), len(diffs)))
    widths = {name: math.prod(finetuned.tensors[name].shape[1:]) for name in common.rows}
    total = sum(rows * widths[name] for name, rows in common.rows.items())
    done = 0
    modules, others = [], {}
    for name, rows in common.rows.items():
        module = name.removesuffix(".weight")
        stack = _stack(module, diffs, inputs) if module in touched and module != name else None
        root = None if inputs is None else inputs.roots.get(module)
        sums = _BlockSums(stack, root, None if control is None else control.factors.get(module))
        width = max(1, widths[name])
        step = max(1, block_numbers // width)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            sums.add(
                original.rows(name, start, stop), finetuned.rows(name, start, stop), start, stop
            )
            done += (stop - start) * width
            progress.report(done, total)
        if stack is None:
            if inputs is None or root is not None:
                others[module] = sums.delta_square
        else:
            modules.append(sums.result(module, stack))
            gram += stack.gram
    return WeightProjection(tuple(diffs), tuple(modules), gram, others, common.left_out)


def project_adapter(
    adapter: LoRADiff,
    diffs: Mapping[str, LoRADiff],
    *,
    inputs: ModuleInputs | None = None,
    control: LoRADiff | None = None,
) -> WeightProjection:
    """Project a finetune that is an adapter: from the factors alone, without any weights.

    ``inputs`` weighs it, ``control`` is taken off it.
    """
    if control is not None:
        adapter = adapter - control
    modules = []
    gram = np.zeros((len(diffs), len(diffs)))
    touched = _modules_of(diffs, inputs)
    if not set(adapter.factors) & set(touched):
        raise UserError("adapter and directions share no module; they belong to different models")
    shapes = {name: factors.shape for name, factors in adapter.factors.items()}
    for name, shape in touched.items():
        if shapes.get(name, shape) != shape:
            raise UserError(
                f"{name} is {list(shapes[name])} in the adapter and {list(shape)} in the "
                "directions; they belong to different models"
            )
    if inputs is not None:
        adapter = inputs.weigh(adapter)
    others = {
        name: max(0.0, f.inner(f)) for name, f in adapter.factors.items() if name not in touched
    }
    for name in touched:
        stack = _stack(name, diffs, inputs)
        factors = adapter.factors.get(name)
        zeros = (0.0,) * len(diffs)
        square, inner, null = 0.0, zeros, zeros
        if factors is not None:
            square = max(0.0, factors.inner(factors))  # what a control cancels leaves rounding
            inner, null = stack.inner(factors), stack.null(factors)
        modules.append(
            ModuleProjection(name, layer_number(name), square, inner, stack.squares, null, zeros)
        )
        gram += stack.gram
    return WeightProjection(tuple(diffs), tuple(modules), gram, others)


class WeightProjector:
    """The call that projections in weight space are known by."""

    @staticmethod
    def compute_layer_projections(
        model: nn.Module | str | Path,
        lora_diff_path: LoRADiff | str | Path,
        num_layers: int | None = None,
        *,
        original: nn.Module | str | Path | None = None,
    ) -> dict[int, float]:
        """Return the coordinate ⟨ΔWₗ, Lₗ⟩ / ‖Lₗ‖ of every layer l of a finetuned model.

        ``original`` is the model before finetuning; by default the one that the diff names. The
        coordinate is in units of the Frobenius norm of weights.

        Raises:
            UserError: The diff has layers from ``num_layers`` on, or the models do not fit it.
        """
        diff = as_diff(lora_diff_path)
        before, revision = original, None
        if before is None:
            training = diff.sources.get("training", {})
            before, revision = diff.base_model.name, training.get("revision")
        found = project_weights(
            weights_of(before, revision), weights_of(model), {"diff": diff}
        ).by_layer()
        outside = [layer for layer in found if num_layers is not None and layer >= num_layers]
        if outside:
            raise UserError(
                f"the diff reaches layer {outside[-1]}, and num_layers is {num_layers}; leave it "
                "out, or give the model's own number"
            )
        return {layer: each["diff"].coordinate for layer, each in found.items()}


@dataclass(frozen=True)
class _Stack:
    """The factors of all diffs at one module, side by side: A [R, in], B [out, R], in float64.

    Where the module is weighed, A is A·root.
    """

    A: Tensor
    B: Tensor
    owner: Tensor  # [R], which diff a rank belongs to
    number: int
    root: Tensor | None

    @cached_property
    def gram(self) -> Array:
        """⟨Lᵢ, Lⱼ⟩ within this module, ``[K, K]``."""
        products = (self.B.T @ self.B) * (self.A @ self.A.T)  # [R, R]
        return np.asarray(self.summed(self.summed(products).T).T.cpu().numpy())

    @property
    def squares(self) -> tuple[float, ...]:
        """‖Lₖ‖² within this module."""
        return tuple(float(value) for value in np.diag(self.gram))

    def inner(self, factors: LoRAFactors) -> tuple[float, ...]:
        """Return ⟨BA, Lₖ⟩ of one change of this module."""
        left = self.B.T @ factors.B.double()  # [R, rank]
        right = self.A @ factors.A.double().T  # [R, rank]
        return tuple(self.summed((left * right).sum(dim=1)).tolist())

    def null(self, factors: LoRAFactors) -> tuple[float, ...]:
        """Return the variance of ⟨BA, QLₖ⟩ over random orthogonal Q, for one change BA."""
        right = self.A @ factors.A.double().T  # [R, rank]
        return self.turned(right @ (factors.B.double().T @ factors.B.double()) @ right.T)

    def turned(self, seen: Tensor) -> tuple[float, ...]:
        """Return ‖Bₖ Tₖᵀ‖² / out from TᵀT, ``[R, R]``, with T = ΔW Aᵀ, for every diff k."""
        return self._own_sums((self.B.T @ self.B) * seen, len(self.B))

    @property
    def rounding(self) -> tuple[float, ...]:
        """‖Lₖ Σ‖²: what the variance of an entry of ΔW is multiplied by in that of ⟨ΔW, Lₖ⟩."""
        A = self.A if self.root is None else self.A @ self.root.T
        return self._own_sums((self.B.T @ self.B) * (A @ A.T), 1)

    def _own_sums(self, products: Tensor, divisor: int) -> tuple[float, ...]:
        """Return Σᵢⱼ over the ranks i and j of each diff alone, divided."""
        own = self.owner[:, None] == self.owner[None]
        return tuple((self.summed((products * own).sum(dim=1)).clamp_min(0) / divisor).tolist())

    def summed(self, by_rank: Tensor) -> Tensor:
        """Return sums over the ranks of each diff: ``[R, …]`` to ``[K, …]``."""
        return by_rank.new_zeros(self.number, *by_rank.shape[1:]).index_add_(0, self.owner, by_rank)


class _BlockSums:
    """Sums over the blocks of one tensor."""

    def __init__(
        self, stack: _Stack | None, root: Tensor | None, control: LoRAFactors | None
    ) -> None:
        self.delta_square = 0.0
        self._stack = stack
        self._root = None if root is None else root.double()
        self._control = control
        ranks = 0 if stack is None else len(stack.owner)
        self._inner = torch.zeros(ranks, dtype=torch.float64)
        self._seen = torch.zeros(ranks, ranks, dtype=torch.float64)
        self._rounding = 0.0
        self._numel = 0

    def add(self, before: Tensor, after: Tensor, start: int, stop: int) -> None:
        delta = _change(before, after)
        self._numel += delta.numel()
        if self._control is not None:
            delta -= self._control.B[start:stop].double() @ self._control.A.double()
        if self._root is not None:
            delta = delta @ self._root
        square = float(torch.dot(delta.flatten(), delta.flatten()))
        if not math.isfinite(square):
            raise UserError("the weights hold NaN or infinity; there is no change to project")
        self.delta_square += square
        if self._stack is not None:
            seen = delta @ self._stack.A.T  # [rows, R]
            self._inner += (seen * self._stack.B[start:stop]).sum(dim=0)
            self._seen += seen.T @ seen
            self._rounding += rounding_variance(after)

    def result(self, module: str, stack: _Stack) -> ModuleProjection:
        variance = self._rounding / max(1, self._numel)
        return ModuleProjection(
            module,
            layer_number(module),
            self.delta_square,
            tuple(stack.summed(self._inner).tolist()),
            stack.squares,
            stack.turned(self._seen),
            tuple(variance * each for each in stack.rounding),
        )


def _change(before: Tensor, after: Tensor) -> Tensor:
    """Return after − before in float64.

    The difference of two numbers of 32 bits or less is rounded once, by at most 2⁻²⁴ of itself, in
    float32, which costs a third; that of bf16 or fp16 weights of like size is exact.
    """
    if torch.float64 in (before.dtype, after.dtype):
        return after.double() - before.double()
    return after.to(torch.float32, copy=True).sub_(before).double()


def rounding_variance(weights: Tensor) -> float:
    """Return Σ ulp²/12 over weights stored in bf16 or fp16; 0 for wider types.

    The error of rounding to the nearest is uniform over one unit in the last place: eps times the
    power of two that is left of a number when its sign and mantissa are cut.
    """
    if weights.dtype not in EXPONENT_BITS:
        return 0.0
    limits = torch.finfo(weights.dtype)
    powers = (weights.view(torch.int16) & EXPONENT_BITS[weights.dtype]).view(weights.dtype).float()
    powers = powers.clamp_min_(limits.tiny).masked_fill_(weights == 0, 0.0)  # 0 is stored exactly
    return float(torch.linalg.vecdot(powers, powers).double().sum()) * limits.eps**2 / 12


def _modules_of(
    diffs: Mapping[str, LoRADiff], inputs: ModuleInputs | None
) -> dict[str, tuple[int, int]]:
    """Return every module that a diff changes, with its shape.

    Raises UserError where shapes differ, or inputs are another model's.
    """
    if not diffs:
        raise UserError("there is no direction to project on; give at least one diff")
    shapes: dict[str, tuple[int, int]] = {}
    for label, diff in diffs.items():
        if inputs is not None:
            inputs.check_fits(diff)
        for name, factors in diff.factors.items():
            if shapes.setdefault(name, factors.shape) != factors.shape:
                raise UserError(
                    f"{name} is {list(factors.shape)} in {label} and {list(shapes[name])} in "
                    "another diff; they belong to different models"
                )
    return shapes


def _check_modules(shapes: Mapping[str, tuple[int, int]], weights: WeightSource) -> None:
    missing = [name for name in shapes if f"{name}.weight" not in weights.tensors]
    if missing:
        raise UserError(
            f"{weights.label} has no weight {missing[0]}.weight, which a diff changes "
            f"({len(missing)} of {len(shapes)} modules are missing); the diff belongs to another "
            "model"
        )
    for name, shape in shapes.items():
        stored = tuple(weights.tensors[f"{name}.weight"].shape)
        if stored != shape:
            raise UserError(
                f"{name} is {list(shape)} in a diff and {list(stored)} in {weights.label}; they "
                "belong to different models"
            )


def _stack(name: str, diffs: Mapping[str, LoRADiff], inputs: ModuleInputs | None) -> _Stack:
    held = [
        (index, diff.factors[name])
        for index, diff in enumerate(diffs.values())
        if name in diff.factors
    ]
    A = torch.cat([factors.A.double() for _, factors in held])
    root = None if inputs is None else inputs.root(name, A.shape[1]).to(A)
    return _Stack(
        A if root is None else A @ root,
        torch.cat([factors.B.double() for _, factors in held], dim=1),
        torch.tensor(
            [index for index, factors in held for _ in range(factors.rank)], device=A.device
        ),
        len(diffs),
        root,
    )


def _projection(modules: Sequence[ModuleProjection], index: int, delta: float) -> Projection:
    inner = math.fsum(m.inner[index] for m in modules)
    length = math.sqrt(math.fsum(m.diff_square[index] for m in modules))
    if length == 0:
        return Projection(inner, 0.0, 0.0, 0.0, None, 0.0)
    # A sum over many modules and ranks is as good as normal.
    null = math.sqrt(math.fsum(m.null_square[index] for m in modules)) / length
    rounding = math.sqrt(math.fsum(m.rounding_square[index] for m in modules)) / length
    coordinate = inner / length
    return Projection(
        inner,
        coordinate,
        coordinate / delta if delta else 0.0,
        null,
        math.erfc(abs(coordinate) / null / math.sqrt(2)) if null else None,
        rounding,
    )
