"""The difference of two LoRAs as low-rank factors: algebra, Frobenius geometry, file formats.

A LoRA changes a weight by s·B·A, where s is its scaling. The difference of two of them,

    s₊B₊A₊ − s₋B₋A₋ = [s₊B₊, −s₋B₋] · [A₊; A₋],

is again a LoRA, of rank r₊ + r₋, exactly. Subtracting the factors, (B₊ − B₋)(A₊ − A₋), is not the
difference: it adds the cross terms B₊A₋ and B₋A₊. Where A₊ and A₋ are one A, bit for bit, the
difference is (s₊B₊ − s₋B₋)·A, of rank r, and so is every mix. Nothing here ever forms the dense
matrix, and nothing here knows a model.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from persona_lora.core.adapter_files import FactorsOnDisk, read_factors, write_adapter
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, nearest_names
from persona_lora.core.given import whole_numbers
from persona_lora.core.json_text import as_json
from persona_lora.core.tensor_files import tensor_digest

BANDS = 3  # of layers
WEIGHED = "weighed by "  # begins the fingerprint of what is measured in the geometry of inputs
By = Literal["trait", "layers", "modules"]


@dataclass(frozen=True, eq=False)
class LoRAFactors:
    """A low-rank weight change of one module: delta = B @ A, scaling folded into B.

    Shapes:
        A ``[rank, in]``, B ``[out, rank]``, both fp32.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise UserError(
                f"factors of shapes A {list(self.A.shape)} and B {list(self.B.shape)} do not "
                "multiply; expected A [rank, in] and B [out, rank]"
            )

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape ``(out, in)`` of the weight that the factors change."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """Return the dense change B @ A, ``[out, in]`` in fp32."""
        return self.B.float() @ self.A.float()

    def inner(self, other: LoRAFactors) -> float:
        """Return ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), in float64 and from the factors alone."""
        left = self.B.double().T @ other.B.double()  # [rank₁, rank₂]
        right = self.A.double() @ other.A.double().T  # [rank₁, rank₂]
        return float((left * right).sum())


@dataclass(frozen=True)
class BaseModel:
    """The model that a diff belongs to: its name, and a fingerprint of its weights if known."""

    name: str
    fingerprint: str | None = None


class Compressed(NamedTuple):
    """A diff of lower rank, and the share of ‖diff‖² that it keeps (0–1)."""

    diff: LoRADiff
    energy_kept: float


@dataclass(frozen=True, eq=False)
class LoRADiff:
    """A direction in weight space: low-rank factors by canonical module name.

    Module names are those of the unwrapped model, as in ``model.layers.0.self_attn.q_proj``.
    Diffs add, subtract and scale; ranks add up where A differs.
    """

    factors: Mapping[str, LoRAFactors]
    base_model: BaseModel
    trait: str | None = None
    sources: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.factors:
            raise UserError("a diff without modules changes nothing; check the adapter files")
        for module, factors in self.factors.items():
            if not (torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()):
                raise UserError(
                    f"the factors of {module} hold NaN or infinity; the training run diverged, "
                    "train again with a lower learning rate"
                )
        _check_sources(self.sources)

    def content(self) -> str:
        """Return a digest of the factors: a name and a path say nothing about them."""
        return self._content

    @cached_property
    def _content(self) -> str:
        return digest_of(
            {
                name: [tensor_digest(each.A), tensor_digest(each.B)]
                for name, each in self.factors.items()
            }
        )

    def inputs(self, name: str) -> dict[str, str]:
        """Return digests of the diff, and of its training where it says how it was trained."""
        return {name: self.content(), **self.training(name)}

    def training(self, name: str) -> dict[str, str]:
        """Return a digest of all of the training but the seed, and the seed; {} where unknown."""
        training = self.sources.get("training")
        if training is None or self.sources.get("seed") is None:
            return {}
        own = {key: each for key, each in training.get("training", {}).items() if key != "seed"}
        return {
            f"the training of {name}": digest_of({**training, "training": own}),
            f"the seed of {name}": str(self.sources["seed"]),
        }

    # -- making and keeping ----------------------------------------------------------------

    @classmethod
    def from_adapters(
        cls,
        pos: str | Path,
        neg: str | Path,
        *,
        trait: str | None = None,
        fingerprint: str | None = None,
        sources: Mapping[str, Any] | None = None,
    ) -> LoRADiff:
        """Return positive minus negative LoRA from two PEFT adapter folders, exactly.

        Raises:
            UserError: Adapters of different base models, or what is not a plain low-rank change
                (DoRA, bias, ``modules_to_save``, embedding LoRA).
        """
        positive, negative = read_factors(Path(pos)), read_factors(Path(neg))
        if positive.base_model_name != negative.base_model_name:
            raise UserError(
                f"{pos} was trained on {positive.base_model_name!r} and {neg} on "
                f"{negative.base_model_name!r}; train both on the same base model, or give it "
                "one name in both adapter_config.json"
            )
        base_model = BaseModel(positive.base_model_name, fingerprint)
        provenance = {"pos": str(pos), "neg": str(neg), **(sources or {})}
        plus, minus = (
            cls(_to_factors(side.factors), base_model, trait) for side in (positive, negative)
        )
        return replace(plus - minus, sources=provenance)

    @classmethod
    def load(cls, path: str | Path, *, on_disk: bool = False) -> LoRADiff:
        """Load a diff from a diff folder, a PEFT adapter, a ``.safetensors`` or a ``.pt`` file.

        A ``.pt`` file is read with ``weights_only=True``. With ``on_disk`` the factors of a folder
        are read a module at a time, each time they are asked for, and never held.

        Raises:
            UserError: Names the file that is missing, truncated, not finite or not a plain
                low-rank change.
        """
        read = read_factors(Path(path), on_disk=on_disk)
        said = read.provenance
        base = {"name": read.base_model_name, **said.get("base_model", {})}
        try:
            return cls(
                factors=_to_factors(read.factors),
                base_model=BaseModel(base["name"], base.get("fingerprint")),
                trait=said.get("trait"),
                sources=said.get("sources", {"path": str(path)}),
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> Path:
        """Write a PEFT adapter folder with ``diff.json`` beside it, atomically; return its path.

        The adapter has ``r = lora_alpha`` in every module and no rsLoRA, so its scaling is 1 and
        PEFT applies exactly this diff. Raises UserError for sources that JSON cannot hold.
        """
        provenance = {
            "trait": self.trait,
            "base_model": vars(self.base_model),
            "sources": as_json(self.sources),
        }
        tensors = {module: (each.A, each.B) for module, each in self.factors.items()}
        return write_adapter(Path(folder), tensors, self.base_model.name, provenance)

    # -- algebra ---------------------------------------------------------------------------

    def __add__(self, other: LoRADiff) -> LoRADiff:
        return mix({self: 1.0, other: 1.0}) if self is not other else self * 2.0

    def __sub__(self, other: LoRADiff) -> LoRADiff:
        return mix({self: 1.0, other: -1.0}) if self is not other else self * 0.0

    def __mul__(self, coefficient: float) -> LoRADiff:
        scale = finite_coefficient(coefficient)
        return self._map(lambda each: LoRAFactors(each.A, each.B * scale))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LoRADiff:
        if divisor == 0:
            raise UserError("a diff cannot be divided by 0")
        return self * (1.0 / finite_coefficient(divisor))

    def __neg__(self) -> LoRADiff:
        return self * -1.0

    def _map(self, change: Callable[[LoRAFactors], LoRAFactors]) -> LoRADiff:
        return replace(
            self, factors={module: change(each) for module, each in self.factors.items()}
        )

    def at(self, layers: int | Iterable[int]) -> LoRADiff:
        """Return the diff restricted to some decoder layers; UserError for one that it has not."""
        wanted = set(whole_numbers(layers, "layers"))
        by_layer = {module: layer_number(module) for module in self.factors}
        held = {layer for layer in by_layer.values() if layer is not None}
        if not wanted or wanted - held:
            named = sorted(wanted - held)
            raise UserError(
                f"the diff changes nothing in layer {named[0] if named else '(none was named)'}; "
                f"it has layers {', '.join(map(str, sorted(held)))}"
            )
        kept = [module for module, layer in by_layer.items() if layer in wanted]
        return replace(self, factors={module: self.factors[module] for module in kept})

    # -- geometry --------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(factors.rank for factors in self.factors.values())

    def inner(self, other: LoRADiff, *, allow_other_base: bool = False) -> float:
        """Return the Frobenius inner product Σ ⟨B₁A₁, B₂A₂⟩ = Σ tr((B₁ᵀB₂)(A₂A₁ᵀ)), in fp64.

        Modules that only one of the two changes contribute nothing.

        Raises:
            UserError: Diffs of different base models (unless ``allow_other_base``), of weights of
                other shapes, or without a module in common.
        """
        check_diffs([self, other])
        if not allow_other_base:
            shared_base_model([self, other])
        shared = self.factors.keys() & other.factors.keys()
        if not shared:
            raise UserError(
                f"two diffs share no module ({next(iter(self.factors))} … and "
                f"{next(iter(other.factors))} …), so that any number between them would be 0; "
                "compare diffs of the same modules"
            )
        for module in shared:
            _check_one_shape(module, [self.factors[module], other.factors[module]])
        return math.fsum(self.factors[module].inner(other.factors[module]) for module in shared)

    def norm(self) -> float:
        """Return the Frobenius norm over all modules."""
        return math.sqrt(max(self.inner(self), 0.0))

    def cosine(self, other: LoRADiff, *, allow_other_base: bool = False) -> float:
        """Return ⟨self, other⟩ / (‖self‖·‖other‖), in [-1, 1].

        Raises UserError where ``inner`` does, and where a norm is zero.
        """
        inner = self.inner(other, allow_other_base=allow_other_base)
        norms = self.norm() * other.norm()
        if norms == 0:
            raise UserError("the cosine with a diff of norm 0 is undefined")
        return min(1.0, max(-1.0, inner / norms))  # rounding may pass 1

    def compress(
        self,
        *,
        rank: int | None = None,
        energy: float | None = None,
        roots: Mapping[str, Tensor] | None = None,
    ) -> Compressed:
        """Cut the rank of every module to ``rank``, or to what keeps the share ``energy`` of ‖·‖².

        Exact in factor space: QR of B and of Aᵀ, then the SVD of the small core. With ``roots``,
        R ``[in, k]`` by module, ‖·‖ is that of ΔW·R, the error on inputs with E[x xᵀ] = R Rᵀ: what
        is kept is U·Uᵀ·ΔW with U the leading left singular vectors of ΔW·R.

        Source:
            Eckart and Young 1936: no other diff of that rank is nearer in the Frobenius norm.

        Raises:
            UserError: Neither or both of ``rank`` and ``energy``, or one out of its range.
        """
        check_cut(rank, energy)
        cut, kept, total = {}, [], []
        for module, factors in self.factors.items():
            root = None if roots is None else roots[module]
            cut[module], kept_here, total_here = truncated(factors, rank, energy, root)
            kept.append(kept_here)
            total.append(total_here)
        whole = math.fsum(total)
        share = math.fsum(kept) / whole if whole else 1.0
        sources = dict(self.sources)
        if "kept" in sources:  # of the difference that this is a part of
            sources["kept"] = sources["kept"] * share if roots is None else None
        return Compressed(replace(self, factors=cut, sources=sources), share)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raise UserError unless one of ``rank`` and ``energy`` is given, and in its range."""
    if (rank is None) == (energy is None):
        raise UserError("a rank is cut by either rank or energy")
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy must lie in (0, 1], got {energy}")


def random_diff_like(diff: LoRADiff, seed: int) -> LoRADiff:
    """Return a diff with the singular values of ``diff`` in every module and random directions.

    The control of a diff: as large, as spread over modules and ranks, and pointing nowhere. Left
    and right singular vectors are uniform (Haar) on the orthonormal frames of their spaces.
    """
    generator = torch.Generator().manual_seed(seed)

    def turned(factors: LoRAFactors) -> LoRAFactors:
        core = torch.linalg.qr(factors.B.double()).R @ torch.linalg.qr(factors.A.double().T).R.T
        root = torch.linalg.svdvals(core).sqrt()
        out, width = factors.shape
        left, right = _frame(out, len(root), generator), _frame(width, len(root), generator)
        return LoRAFactors(A=(root[:, None] * right.T).float(), B=(left * root).float())

    return replace(diff._map(turned), sources={"seed": seed, "spectrum_of": diff.trait})


def turned_diff(diff: LoRADiff, seed: int) -> LoRADiff:
    """Return QBA with Q orthogonal, uniform at random in every module: the same inputs, read alike.

    The null of a projection of an adapter on ``diff``: LoRAs that began from one seed share their A
    whatever they were trained on, and a fresh A would make any of them look far from all chance.
    """
    generator = torch.Generator().manual_seed(seed)

    def turned(factors: LoRAFactors) -> LoRAFactors:
        basis, core = torch.linalg.qr(factors.B.double())
        frame = _frame(len(basis), basis.shape[1], generator)
        return LoRAFactors(factors.A, (frame @ core).float())

    return replace(diff._map(turned), sources={"seed": seed, "turned": diff.trait})


def _frame(size: int, number: int, generator: torch.Generator) -> Tensor:
    """Return ``number`` random orthonormal columns, ``[size, number]``."""
    q, r = torch.linalg.qr(torch.randn(size, number, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()  # without the signs the frames would not be uniform


def mix(terms: Mapping[LoRADiff, float]) -> LoRADiff:
    """Return Σ cᵢ·diffᵢ as one diff: of the summed rank, or of one where all share their A.

    Raises:
        UserError: Diffs of different base models, or of weights of other shapes, or a coefficient
            that is not finite.
    """
    if not isinstance(terms, Mapping) or not terms:
        raise UserError("a mix needs at least one diff with its coefficient, as in {evil: -1.0}")
    diffs = list(terms)
    base_model = shared_base_model(diffs)
    stacked: dict[str, list[LoRAFactors]] = defaultdict(list)
    for diff, coefficient in terms.items():
        scale = finite_coefficient(coefficient)
        for module, each in diff.factors.items():
            stacked[module].append(LoRAFactors(each.A, each.B * scale))
    traits = {diff.trait for diff in diffs}
    return LoRADiff(
        factors={module: _summed(module, parts) for module, parts in stacked.items()},
        base_model=base_model,
        trait=traits.pop() if len(traits) == 1 else None,
        sources=_merged_sources(terms),
    )


def _summed(module: str, parts: Sequence[LoRAFactors]) -> LoRAFactors:
    """Return Σ BᵢAᵢ: those of an equal A add their B, the others stand side by side."""
    _check_one_shape(module, parts)
    distinct: list[LoRAFactors] = []
    for part in parts:
        for place, held in enumerate(distinct):
            if torch.equal(held.A, part.A):
                distinct[place] = LoRAFactors(held.A, held.B + part.B)
                break
        else:
            distinct.append(part)
    return LoRAFactors(
        torch.cat([each.A for each in distinct]), torch.cat([each.B for each in distinct], dim=1)
    )


def _check_one_shape(module: str, parts: Sequence[LoRAFactors]) -> None:
    shapes = sorted({part.shape for part in parts})
    if len(shapes) > 1:
        raise UserError(
            f"{module} is {' and '.join(str(list(each)) for each in shapes)} in diffs that should "
            "be of one model; take diffs of one model, all weighed by inputs or none"
        )


def check_diffs(diffs: Iterable[Any]) -> None:
    """Raise UserError for what is no diff."""
    for each in diffs:
        if not isinstance(each, LoRADiff):
            raise UserError(
                f"a diff is expected, got {repr(each)[:80]}; load one with LoRADiff.load(path)"
            )


def as_diff(lora_diff: LoRADiff | str | Path) -> LoRADiff:
    """Return the diff itself, or the one loaded from a path; UserError for anything else."""
    if isinstance(lora_diff, str | Path):
        return LoRADiff.load(lora_diff)
    check_diffs([lora_diff])
    return lora_diff


def shared_base_model(diffs: Sequence[LoRADiff]) -> BaseModel:
    """Return the base model that all diffs agree on; raises UserError where two differ.

    Fingerprints decide where both are known, names otherwise; a file that names no base model
    (a bare ``.pt``) mixes with any.
    """
    check_diffs(diffs)
    return agreed_base([diff.base_model for diff in diffs], "diffs")


def agreed_base(bases: Sequence[BaseModel], what: str) -> BaseModel:
    """Return the base model that all ``what`` agree on, as ``shared_base_model`` does of diffs."""
    reference = max(bases, key=lambda base: (base.fingerprint or "", base.name))
    for base in bases:
        if not _may_be_same(reference, base):
            remedy = (
                "where these are one model, give it one name in the files of both "
                "(base_model_name_or_path in adapter_config.json, base_model in diff.json)"
            )
            if reference.fingerprint and base.fingerprint:
                remedy = f"their weights differ, take {what} of one model"
            if _weighed(reference) or _weighed(base):
                raise UserError(
                    f"{what} of different geometries do not mix: one is not weighed by inputs, or "
                    "by others; weigh both by the same"
                )
            raise UserError(
                f"{what} of different base models do not mix: {reference.name!r} and "
                f"{base.name!r}; {remedy}"
            )
    return reference


def _may_be_same(first: BaseModel, second: BaseModel) -> bool:
    known = first.fingerprint is not None and second.fingerprint is not None
    if known or _weighed(first) or _weighed(second):
        return first.fingerprint == second.fingerprint
    return first.name == second.name or not (first.name and second.name)


def _weighed(base: BaseModel) -> bool:
    return (base.fingerprint or "").startswith(WEIGHED)


def finite_coefficient(coefficient: float) -> float:
    """Return a number, of numpy or torch too, as a float.

    Raises UserError where it is none, NaN, or beyond what fp32 holds.
    """
    try:
        value = math.nan if isinstance(coefficient, str | bytes) else float(coefficient)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is of tensors of torch
        value = math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise UserError(f"coefficient must be a finite number, got {repr(coefficient)[:80]}")
    return value


def layer_number(module: str) -> int | None:
    """Return the decoder layer 0 … num_layers−1 that a module name lies in, or None."""
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", module)
    return int(found.group(1)) if found else None


def parts_of(diff: LoRADiff, by: By) -> list[str]:
    """Return the names of what a diff is cut into: bands "0-9" …, blocks "mlp" …, or "" for all.

    Beside the bands each module stands that lies in no layer ("lm_head"): the parts make the whole.
    """
    if by == "trait":
        return [""]
    if by == "modules":
        return sorted({_block(module) for module in diff.factors})
    layers = sorted({at for module in diff.factors if (at := layer_number(module)) is not None})
    edges = sorted({round(len(layers) * at / BANDS) for at in range(BANDS + 1)})
    bands = [f"{layers[low]}-{layers[high - 1]}" for low, high in pairwise(edges)]
    return bands + sorted(module for module in diff.factors if layer_number(module) is None)


def part_of(diff: LoRADiff, part: str) -> LoRADiff:
    """Return a diff in a band of layers "0-9", one kind of block, or one module.

    UserError for no such, and for a band that does not begin and end with layers of the diff.
    """
    first, _, last = part.partition("-")
    if first.isdigit() and last.isdigit():
        band = range(int(first), int(last) + 1)
        layers = {at for name in diff.factors if (at := layer_number(name)) is not None}
        return diff.at({*band[:1], *band[-1:], *(at for at in layers if at in band)})
    kept = {name: each for name, each in diff.factors.items() if part in (name, _block(name))}
    if not kept:
        blocks = parts_of(diff, "modules")
        raise UserError(f"the diff changes nothing in {part!r}; {nearest_names(part, blocks)}")
    return replace(diff, factors=kept)


def _block(module: str) -> str:
    """Return the kind of block that a module lies in; the module itself where it lies in none."""
    return module.split(".")[-2:][0]


def load_named(folder: Path, name: str) -> LoRADiff:
    """Load ``{folder}/{trait}/diff`` of a trait, or of "trait@0-9" and "trait@mlp" that part.

    UserError for a part that the diff has not.
    """
    trait, parted, part = name.partition("@")
    whole = LoRADiff.load(folder / trait / "diff")
    return part_of(whole, part) if parted else whole


class _Lazy(FactorsOnDisk):
    """Factors that are read from their file whenever they are asked for."""

    def __getitem__(self, module: str) -> LoRAFactors:
        return LoRAFactors(*super().__getitem__(module))


def _check_sources(sources: Any) -> None:
    """Raise UserError unless all that is read of a diff's sources is there as it is written."""
    training = sources.get("training", {}) if isinstance(sources, Mapping) else None
    if not (isinstance(training, Mapping) and isinstance(training.get("training", {}), Mapping)):
        raise UserError(
            "what a diff says of its sources must be an object, and so must its training and that "
            f"one's own training, got {str(sources)[:200]!r}; remove it from the file"
        )


def _to_factors(tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Mapping[str, LoRAFactors]:
    if isinstance(tensors, FactorsOnDisk):
        return _Lazy(tensors.file, tensors.keys_of, tensors.config)
    return {module: LoRAFactors(A, B) for module, (A, B) in tensors.items()}


def _merged_sources(terms: Mapping[LoRADiff, float]) -> dict[str, Any]:
    if [*terms.values()] == [1.0]:  # what one was made of is not said of a multiple of it
        return dict(next(iter(terms)).sources)
    return {
        "mix": [
            {"coefficient": float(coefficient), "trait": diff.trait, "sources": dict(diff.sources)}
            for diff, coefficient in terms.items()
        ]
    }


class Truncated(NamedTuple):
    """Factors of lower rank, the ‖·‖² that they keep, and that of the whole."""

    factors: LoRAFactors
    kept: float
    total: float


def truncated(
    factors: LoRAFactors, rank: int | None, energy: float | None, root: Tensor | None
) -> Truncated:
    """Cut one module as ``LoRADiff.compress`` cuts all of them."""
    q_out, r_out = torch.linalg.qr(factors.B.double())
    seen = factors.A.double() if root is None else factors.A.double() @ root.double()
    q_in, r_in = torch.linalg.qr(seen.T)
    left, values, right = torch.linalg.svd(r_out @ r_in.T)
    squares = values.square()
    total = float(squares.sum())
    if rank is None:
        share = squares.cumsum(0) / max(total, torch.finfo(torch.float64).tiny)
        rank = int((share < (energy or 1.0) - 1e-12).sum()) + 1
    keep = min(rank, len(values))
    kept, U = float(squares[:keep].sum()), q_out @ left[:, :keep]
    if root is not None:
        A = left[:, :keep].T @ r_out @ factors.A.double()
        return Truncated(LoRAFactors(A=A.float(), B=U.float()), kept, total)
    scale = values[:keep].sqrt()
    cut = LoRAFactors(A=(scale[:, None] * (right[:keep] @ q_in.T)).float(), B=(U * scale).float())
    return Truncated(cut, kept, total)
