"""A basis as the vLLM server holds it, and the command that starts one.

Knows the folder of a basis, how the server's models are called, and vLLM's flags.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from persona_lora.core.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from persona_lora.core.content import file_digest
from persona_lora.core.errors import UserError
from persona_lora.core.lora_diff import LoRADiff

BASIS, MIX = "basis:", "mix:"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be
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
        if rank > RANKS[-1]:
            raise UserError(
                f"the basis in {folder} has rank {rank}, and vLLM takes {RANKS[-1]} at most; cut "
                "it with persona-lora basis --rank"
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

    def program(self) -> list[str]:
        """Return what the model's name follows; the CPU's distribution has no ``vllm serve``."""
        if self.cpu:
            return ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
        return ["vllm", "serve"]

    def environment(self) -> dict[str, str]:
        """Return what the environment has to say."""
        cpu = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        return {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **(cpu if self.cpu else {})}

    def flags(self) -> list[str]:
        """Return vLLM's flags; with blocks of 32 the prefix cache is hit on a CPU too."""
        dtype = self.dtype or ("float32" if self.cpu else "bfloat16")
        size = str(self.tensor_parallel)
        return [
            *("--dtype", dtype, "--tensor-parallel-size", size),
            *(("--block-size", "32") if self.cpu else ()),
            *("--host", self.host, "--port", str(self.port)),
        ]


def server_command(
    model: str, revision: str | None, basis: BasisFolder | None, machine: Machine
) -> str:
    """Return the line that starts a server of a model, with a basis or without one."""
    words = [*machine.program(), model, *machine.flags(), "--generation-config", "vllm"]
    words += [] if revision is None else ["--revision", revision]
    environment = machine.environment()
    if basis is not None:
        environment["PERSONA_LORA_BASIS"] = str(basis.folder)
        rank = next(each for each in RANKS if each >= basis.rank)
        words += ["--served-model-name", model, basis.served.name, "--enable-lora"]
        words += ["--max-loras", str(SLOTS), "--max-cpu-loras", str(4 * SLOTS)]
        words += ["--max-lora-rank", str(rank), "--lora-target-modules", *basis.modules]
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(words)])
