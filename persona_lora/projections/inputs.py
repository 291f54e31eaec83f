"""What flows through the modules of a model, and the geometry of weight changes that it gives.

A change of weights does what it does to the inputs x of its module. With Σ = E[x xᵀ] over ordinary
prompts the inner product

    ⟨ΔW, L⟩_Σ = E[(ΔW x) · (L x)] = tr(ΔW Σ Lᵀ)

says how far two changes do the same; the Frobenius inner product ⟨ΔW, L⟩ also counts directions
that no input has. Two LoRAs of one trait whose training began from other seeds are nearly
orthogonal as matrices and nearly parallel in Σ.

Σ is kept as a root R, Σ = R Rᵀ, because ⟨ΔW, L⟩_Σ = ⟨ΔW R, L R⟩: a weighed diff is a diff of other
width, with which all of the plain geometry goes on. A root has as many columns as the inputs have
directions of note, and is never larger than them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from persona_lora.core import progress
from persona_lora.core.chat import user_question
from persona_lora.core.content import digest_of
from persona_lora.core.errors import UserError, checked_text
from persona_lora.core.files import numbered_jsonl
from persona_lora.core.lora_diff import WEIGHED, BaseModel, Compressed, LoRADiff, LoRAFactors
from persona_lora.core.resources import resource_path
from persona_lora.core.tensor_files import load_with_record, save_with_record
from persona_lora.models.generation import common_prefix
from persona_lora.models.hooks import Hook, Hooked
from persona_lora.models.likelihood import tokenize_rendered
from persona_lora.models.loaded_model import weights_content
from persona_lora.models.loading import ChatModel
from persona_lora.models.structure import decoder_linear_modules, text_decoder, weight_fingerprint
from persona_lora.models.turns import rows_kept_apart

WEIGHTED, PLAIN = "weighted", "plain"  # the two geometries
FORMAT = 2  # of what is kept; another number makes kept files be measured anew
KEPT = 0.999  # of E‖x‖², what the columns of a root keep


@dataclass(frozen=True, eq=False)
class ModuleInputs:
    """The inputs of modules: a root of Σ each, the model's fingerprint, and from what they are.

    ``roots`` are ``[in, k]`` in fp32 by canonical module name; modules that read one input share
    one tensor. ``prompts`` is the digest of the prompts' tokens, ``tokens`` how many were counted.
    """

    roots: Mapping[str, Tensor]
    fingerprint: str
    prompts: str
    tokens: int

    def root(self, module: str, width: int) -> Tensor:
        """Return the root of a module with ``width`` inputs; UserError where there is none."""
        if module not in self.roots:
            raise UserError(
                f"no input of {module} was measured; the statistics belong to another model, or "
                "no prompt reached the module; --plain (drift_plain) leaves inputs out"
            )
        found = self.roots[module]
        if len(found) != width:
            raise UserError(
                f"{module} has {width} inputs, and {len(found)} in the statistics of inputs; they "
                "belong to different models: name the one before finetuning (--original-model, "
                "--base)"
            )
        return found

    def check_fits(self, diff: LoRADiff) -> None:
        """Raise UserError where a diff was made on a model of other weights."""
        known = diff.base_model.fingerprint
        if known is not None and known != self.fingerprint:
            raise UserError(
                f"the diff belongs to {diff.base_model.name!r} of other weights than the model "
                "whose inputs were measured; measure them on that model, or stay in plain weight "
                "space (--plain, drift_plain)"
            )

    def weigh(self, diff: LoRADiff, *, allow_other_base: bool = False) -> LoRADiff:
        """Return ΔW·R in every module: its inner products, norms and cosines are those in Σ.

        The result is for measuring alone; its base model is none, so that no model takes it.

        Raises:
            UserError: The diff belongs to another model (unless ``allow_other_base``), or changes a
                module without inputs.
        """
        roots = self.roots_of(diff, allow_other_base=allow_other_base)
        factors = {
            name: LoRAFactors(each.A.float() @ roots[name].to(each.A.device), each.B)
            for name, each in diff.factors.items()
        }
        marked = f"{WEIGHED}{digest_of([self.fingerprint, self.prompts, self.tokens])}"
        return replace(diff, factors=factors, base_model=BaseModel("", marked))

    def compress(
        self,
        diff: LoRADiff,
        *,
        rank: int | None = None,
        energy: float | None = None,
        allow_other_base: bool = False,
    ) -> Compressed:
        """Cut the rank of a diff where these inputs notice it least (``LoRADiff.compress``).

        Raises UserError as ``weigh`` and ``LoRADiff.compress`` do.
        """
        roots = self.roots_of(diff, allow_other_base=allow_other_base)
        return diff.compress(rank=rank, energy=energy, roots=roots)

    def roots_of(self, diff: LoRADiff, *, allow_other_base: bool = False) -> dict[str, Tensor]:
        """Return the root of every module of a diff; UserError as ``weigh``."""
        if not allow_other_base:
            self.check_fits(diff)
        return {name: self.root(name, each.shape[1]) for name, each in diff.factors.items()}

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        first: dict[int, str] = {}
        shared = {name: first.setdefault(id(root), name) for name, root in self.roots.items()}
        record = {"fingerprint": self.fingerprint, "prompts": self.prompts, "tokens": self.tokens}
        held = {name: self.roots[name] for name in first.values()}
        save_with_record(path, held, "inputs", {**record, "roots": shared})

    @classmethod
    def load(cls, path: Path) -> ModuleInputs:
        """Read what ``save`` wrote; raises UserError for any other file."""
        tensors, record = load_with_record(path, "inputs")
        if not isinstance(record, dict) or not set(record["roots"].values()) <= tensors.keys():
            raise UserError(f"{path} holds no statistics of inputs; make them with --prompts")
        roots = {name: tensors[at] for name, at in record.pop("roots").items()}
        return cls(roots, **record)


def load_ordinary_prompts(datasets: Path | None = None) -> list[str]:
    """Load the ordinary prompts: what inputs and divergence are measured on."""
    name = Path("ordinary") / "prompts.jsonl"
    return read_prompts(
        datasets / name if datasets is not None else resource_path("datasets" / name)
    )


def read_prompts(path: Path) -> list[str]:
    """Read the ``prompt`` of every row; UserError where one has none."""
    rows = numbered_jsonl(path)
    prompts = [checked_text(row.get("prompt"), f"{where}: prompt") for where, row in rows]
    if not prompts:
        raise UserError(f"{path} must hold rows with a prompt, one a line")
    return prompts


def kept_inputs(chat_model: ChatModel, prompts: Sequence[str]) -> ModuleInputs:
    """Return the inputs over prompts from the user's cache, or measure them and keep them there.

    They are known by every weight of the model as it is loaded (one in bf16 has other inputs than
    the same in fp32) and the adapters that are on, by the tokens of the prompts, and by what is
    kept of them.
    """
    asked = tokenized_prompts(chat_model, prompts)
    content = [weights_content(chat_model.model), asked, FORMAT, KEPT]
    name = f"{digest_of(content)[:32]}.safetensors"
    path = user_cache_path("persona_lora") / "inputs" / name
    if path.is_file():
        return ModuleInputs.load(path)
    measured = measure_inputs(chat_model, prompts)
    path.parent.mkdir(parents=True, exist_ok=True)
    measured.save(path)
    return measured


def tokenized_prompts(chat_model: ChatModel, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts as the model is asked them; UserError for none."""
    if not prompts or isinstance(prompts, str):
        raise UserError("inputs are measured on prompts; give a list of at least one")
    rendered = [chat_model.render(user_question(prompt)) for prompt in prompts]
    return [tokenize_rendered(chat_model, each, "").prompt for each in rendered]


@torch.no_grad()
def measure_inputs(chat_model: ChatModel, prompts: Sequence[str]) -> ModuleInputs:
    """Measure the inputs of the decoder's linear modules over prompts, one forward pass each.

    Counted are the tokens after those that all prompts begin with (the template's, among them the
    first token, whose states are of another size than all others); of a module that reads tokens
    which a router chose, all that it read.
    Progress counts prompts. Raises UserError for no prompts, an input that is not finite, and a
    model that is steered at the moment.
    """
    if rows_kept_apart(chat_model.model):
        raise UserError(
            "inputs are those of the model itself, and it is steered now; measure them before, or "
            "after the steerer's block"
        )
    tokenized = tokenized_prompts(chat_model, prompts)
    begins = shared_beginning(tokenized)
    modules = decoder_linear_modules(chat_model.model)
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    decoder = text_decoder(chat_model.model).module
    for number, ids in enumerate(tokenized):
        taken = _Taken(seen, begins, len(ids))
        hooks = [taken.hook(name, module) for name, module in modules.items()]
        with chat_model.turn(), Hooked(hooks):
            decoder(input_ids=torch.tensor([ids], device=chat_model.model.device), use_cache=False)
        progress.report(number + 1, len(tokenized))
    roots: dict[tuple[int, ...], Tensor] = {}
    found = {}
    for name, inputs in seen.items():
        if inputs:
            place = tuple(map(id, inputs))
            if place not in roots:
                roots[place] = _root(torch.cat(inputs), name)
            found[name] = roots[place]
    return ModuleInputs(
        found,
        weight_fingerprint(chat_model.model),
        digest_of(tokenized),
        sum(len(ids) - begins for ids in tokenized),
    )


class _Taken:
    """The inputs of one forward pass; modules that read the same tensor are given the same one."""

    def __init__(self, seen: dict[str, list[Tensor]], begins: int, length: int) -> None:
        self._seen = seen
        self._begins = begins
        self._whole = ((1, length), (length,))  # all tokens in order, as rows or flat
        # The tensors themselves, too: one that is gone could lend its identity to another.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(self, name: str, module: nn.Module) -> Hook:
        def take(_: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
            given = arguments[0] if arguments else next(iter(options.values()))
            if id(given) not in self._copies:
                flat = given.reshape(-1, given.shape[-1])
                kept = flat[self._begins :] if given.shape[:-1] in self._whole else flat
                copy = kept.float().cpu()
                self._copies[id(given)] = given, copy
            self._seen[name].append(self._copies[id(given)][1])

        return Hook(module, take, name, before=True)


def shared_beginning(texts: Sequence[list[int]]) -> int:
    """Return how many tokens all texts begin with; 0 for a single text."""
    return len(common_prefix(texts)) if len(texts) > 1 else 0


def _root(inputs: Tensor, name: str) -> Tensor:
    """Return R ``[in, k]`` with R Rᵀ = E[x xᵀ] over ``inputs [tokens, in]``, but for 1 − KEPT."""
    if not torch.isfinite(inputs).all():
        raise UserError(f"the inputs of {name} hold NaN or infinity; load the model in float32")
    tokens, width = inputs.shape
    x = inputs.double() / max(1, tokens) ** 0.5
    values, vectors = torch.linalg.eigh(x @ x.T if tokens <= width else x.T @ x)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    lost = 1 - values.cumsum(0) / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    k = int((lost > 1 - KEPT).sum()) + 1
    root = x.T @ vectors[:, :k] if tokens <= width else vectors[:, :k] * values[:k].sqrt()
    return root.float().contiguous()
