"""Commands about servers of their own that answer in place of the model in this process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from persona_lora.cli.program import SERVE, command, engine_app
from persona_lora.cli.shared_options import StoredModelOptions
from persona_lora.core.errors import UserError


@dataclass(frozen=True)
class ServerOptions:
    """What the server holds, and where it runs."""

    basis: Annotated[
        Path | None, "The folder that basis wrote; without it the model answers unsteered."
    ] = None
    tensor_parallel: Annotated[int, "GPUs that share one copy of the model."] = 1
    cpu: Annotated[bool, "Without a GPU."] = False
    dtype: Annotated[str | None, "float32 or bfloat16; float32 with --cpu by default."] = None
    host: Annotated[str, "The address to serve at; 0.0.0.0 lets other machines in."] = "127.0.0.1"
    port: Annotated[int, "Its port."] = 8000


@command("command", SERVE, ("engine", engine_app))
def engine_command(*, server: ServerOptions, model: StoredModelOptions) -> None:
    """Print the line that starts a vLLM server for --engine, where vLLM and persona_vllm are.

    Example: persona-lora engine command --basis basis --model Qwen/Qwen2.5-7B-Instruct
    """
    from persona_lora.engines.vllm_command import BasisFolder, Machine, server_command
    from persona_lora.models.loading import model_source

    if server.tensor_parallel < 1 or not 1 <= server.port <= 65535:
        raise UserError(
            "--tensor-parallel must be at least 1 and --port from 1 to 65535, got "
            f"{server.tensor_parallel} and {server.port}"
        )
    basis = None if server.basis is None else BasisFolder.read(server.basis)
    machine = Machine(server.tensor_parallel, server.cpu, server.dtype, server.host, server.port)
    source = model_source(model.model, model.revision)
    place = str(Path(source).resolve()) if Path(source).is_dir() else source
    sys.stdout.write(server_command(place, model.revision, basis, machine) + "\n")
