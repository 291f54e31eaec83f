"""vLLM: the command that starts a server, what it holds, and one server's requests over HTTP.

Knows the folder of a basis, how the server's models are called, vLLM's flags, and the requests and
replies of its completions; refuses to know what is done about a fault.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persona_lora.core.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from persona_lora.core.content import file_digest
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff
from persona_lora.engines.connection import MALFORMED, VLLM, Connection, finite
from persona_lora.judges.retries import Fault
from persona_lora.steering.export import VLLM_RANKS

BASIS, MIX = "basis:", "mix:"
SLOTS = 64  # mixes in one batch; a slot is as many numbers as the basis has diffs


def short_digest(diff: LoRADiff) -> str:
    """Return what a diff is known by in the name of a basis."""
    return diff.content()[:12]


@dataclass(frozen=True)
class ServedBasis:
    """What the name of a served basis says: its digest, and its diffs' in their order."""

    sha: str
    diffs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The model name by which a server says what it holds."""
        return f"{BASIS}{self.sha}:{','.join(self.diffs)}"

    @classmethod
    def of_name(cls, name: str) -> ServedBasis:
        """Read such a name."""
        sha, _, diffs = name.removeprefix(BASIS).partition(":")
        return cls(sha, tuple(diffs.split(",")))

    def mix(self, coefficients: Mapping[str, float]) -> str:
        """Return the model name of a mix, by the digests of diffs."""
        values = (coefficients.get(diff, 0.0) for diff in self.diffs)
        return f"{MIX}{self.sha}:{','.join(map(repr, values))}"


@dataclass(frozen=True)
class BasisFolder:
    """A folder ``{name}/diff`` of diffs that share their A; its rank, and the modules changed."""

    folder: Path
    served: ServedBasis
    rank: int
    modules: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> BasisFolder:
        """Return the basis in a folder; UserError for one that vLLM could not hold."""
        paths = sorted(each.parent for each in folder.glob(f"*/diff/{ADAPTER_CONFIG}"))
        if not paths:
            raise UserError(f"{folder} holds no {{name}}/diff; make one with persona-lora basis")
        diffs = [LoRADiff.load(path) for path in paths]
        _check_shared(folder, diffs)
        whole = hashlib.sha256()  # as the server's plugin computes it
        for path in paths:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                whole.update(bytes.fromhex(file_digest(path / name)))
        rank = max(diff.rank for diff in diffs)
        if rank > VLLM_RANKS[-1]:
            raise UserError(
                f"the basis in {folder} has rank {rank}, and vLLM takes {VLLM_RANKS[-1]} at most; "
                "cut it with persona-lora basis --rank"
            )
        served = ServedBasis(whole.hexdigest()[:16], tuple(map(short_digest, diffs)))
        modules = sorted({name.rpartition(".")[2] for diff in diffs for name in diff.factors})
        return cls(folder.resolve(), served, rank, tuple(modules))


def _check_shared(folder: Path, diffs: list[LoRADiff]) -> None:
    for diff in diffs:
        for name, factors in diff.factors.items():
            first = next(each.factors[name] for each in diffs if name in each.factors)
            if not torch.equal(first.A, factors.A):
                raise UserError(
                    f"the diffs in {folder} do not share the A of {name}; bring them onto one "
                    "basis with persona-lora basis, and name its folder"
                )


@dataclass(frozen=True)
class Machine:
    """Where a server runs: on how many GPUs, or on the CPU; at which address."""

    tensor_parallel: int = 1
    cpu: bool = False
    dtype: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000


def server_command(
    model: str, revision: str | None, basis: BasisFolder | None, machine: Machine
) -> str:
    """Return the line that starts a server of a model, with a basis or without one.

    The CPU's distribution has no ``vllm serve``; with blocks of 32 its prefix cache is hit too.
    """
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    words, dtype, blocks = ["vllm", "serve"], "bfloat16", []
    if machine.cpu:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
        dtype, blocks = "float32", ["--block-size", "32"]
    words += [model, "--dtype", machine.dtype or dtype]
    words += ["--tensor-parallel-size", str(machine.tensor_parallel), *blocks]
    words += ["--host", machine.host, "--port", str(machine.port), "--generation-config", "vllm"]
    words += [] if revision is None else ["--revision", revision]
    if basis is not None:
        environment["PERSONA_LORA_BASIS"] = str(basis.folder)
        rank = next(each for each in VLLM_RANKS if each >= basis.rank)
        words += ["--served-model-name", model, basis.served.name, "--enable-lora"]
        words += ["--max-loras", str(SLOTS), "--max-cpu-loras", str(4 * SLOTS)]
        words += ["--max-lora-rank", str(rank), "--lora-target-modules", *basis.modules]
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(words)])


OF_VLLM = "an engine that holds a basis is a server of vLLM"
PLAIN: Mapping[str, Any] = {  # nothing beside, whatever a model's authors would have
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Holdings:
    """A server's plain model, its basis where it has one, of which kind it is, and whose."""

    model: str
    basis: ServedBasis | None
    kind: str = VLLM
    owner: str = ""

    def name(self, coefficients: Mapping[str, float]) -> str:
        """Return the model name for coefficients by the digests of diffs; zeros are the model."""
        used = {diff: value for diff, value in coefficients.items() if value}
        if not used:
            return self.model
        if self.basis is None or not used.keys() <= set(self.basis.diffs):
            raise UserError(
                "the engine does not hold the diffs that are asked for; start it with the line "
                "that persona-lora engine command --basis prints, and name diffs of that basis "
                "(basis/evil/diff)"
            )
        return self.basis.mix(used)


class VLLMServer(Connection):
    """A server as vLLM's, if it is one: ``holdings`` says so."""

    async def holdings(self) -> Holdings:
        """Ask what the server holds; Fault for what answers nothing."""
        cards = [each for each in await self.cards() if each.get("parent") is None]
        names = [str(each.get("id")) for each in cards]
        bases = [ServedBasis.of_name(each) for each in names if each.startswith(BASIS)]
        if not (model := self.named or (names or [""])[0]):
            raise Fault("it serves no model", status=404)
        kind = await self.kind(model)
        owner = next((str(e.get("owned_by")) for e in cards if e.get("id") == model), "")
        return Holdings(model, bases[0] if bases and kind == VLLM else None, kind, owner)

    async def answer(
        self, model: str, tokens: Sequence[int], sampling: Mapping[str, Any]
    ) -> list[int]:
        """Return the new tokens of one row, with the one that ended it; Fault where there are none.

        Each token comes with its log-probability: NaN or infinity is never an answer.
        """
        body = {**PLAIN, **sampling, "model": model, "prompt": list(tokens)}
        choice, _ = await self.complete({**body, "return_token_ids": True, "logprobs": 0})
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {})
        found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if choice.get("finish_reason") == "abort":
            raise Fault("it gave up an answer on its way", passing=True)
        if not isinstance(ids, list) or not ids or not all(map(_token, ids)):
            raise Fault(f"the reply has no token ids; {OF_VLLM}", status=MALFORMED)
        if not isinstance(found, list) or len(found) != len(ids) or not all(map(finite, found)):
            raise Fault(f"{model} gives NaN or infinity; steer with less", status=MALFORMED)
        return ids

    async def logprobs(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Return the log-probability of each token of a text but the first."""
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "prompt_logprobs": 0}
        choice, _ = await self.complete({**PLAIN, **body, "temperature": 0.0})
        places = choice.get("prompt_logprobs")
        if not isinstance(places, list) or len(places) != len(tokens):
            raise Fault(f"the reply has no prompt_logprobs; {OF_VLLM}", status=MALFORMED)
        try:
            pairs = zip(tokens[1:], places[1:], strict=True)
            return [float(place[str(token)]["logprob"]) for token, place in pairs]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Fault(
                f"its prompt_logprobs are malformed; {OF_VLLM}", status=MALFORMED
            ) from error


def _token(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**32  # more, no tokenizer can read
