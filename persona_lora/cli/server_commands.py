"""The command that serves mixes to other programs."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated

import typer

from persona_lora.cli.console import show
from persona_lora.cli.program import SERVE, command, environment
from persona_lora.cli.serving_commands import Mixed, listening
from persona_lora.cli.shared_options import ModelOptions, load_model
from persona_lora.core.errors import UserError

INSTALL = 'pip install "persona-lora[serve]"'
KEY = "PERSONA_LORA_API_KEY"


@dataclass(frozen=True)
class ServerOptions(Mixed):
    """What is served where, to how many at once."""

    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any.")] = 8000
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that run at once.")] = 16
    max_waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait; then 429.")] = 64
    grace: Annotated[float, "Seconds that running answers get when it is stopped."] = 20.0

    def check(self, key: str | None) -> None:
        """UserError for an address that others reach without a key, and a negative grace."""
        if self.grace < 0:
            raise UserError(f"--grace must be 0 or more seconds, got {self.grace:g}")
        try:
            alone = self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            alone = False
        if not (alone or key):
            raise UserError(
                f"--host {self.host} lets other machines in; set {KEY} in the environment or .env "
                "first, or leave --host out"
            )


@command("serve", SERVE)
def serve(*, served: ServerOptions, model: ModelOptions) -> None:
    """Serve mixes to any OpenAI client; the model's name is the mix. Needs the extra "serve".

    base, base+0.8*formality-0.05nat*evil (calibrate), or a saved mix; different ones run in one
    batch. The key, if any, is PERSONA_LORA_API_KEY of the environment or .env; other machines are
    let in with one.

    Example: persona-lora serve --traits evil,sycophancy,formality --dtype float32
    """
    try:
        from persona_lora.serving.server import Server, Service
    except ImportError as error:
        raise UserError(f"the server's libraries are not installed; run: {INSTALL}") from error
    from persona_lora.serving.batching import Batch
    from persona_lora.serving.mixes import Personas

    key = environment().get(KEY)
    served.check(key)
    diffs = served.load()
    with listening(served.host, served.port) as place:
        chat_model = load_model(model, diffs.values(), allow_other_base=served.allow_other_base)
        batch = Batch(
            chat_model, diffs, max_batch=served.max_batch, most_waiting=served.max_waiting
        )
        personas = Personas(batch.traits, served.mixes, served.of_nats(diffs))
        host, port = place.getsockname()[:2]
        show(f"http://{host}:{port}/v1 answers as {', '.join(personas.names())} (Ctrl+C ends it)")
        Server(Service(batch, personas, key), served.grace).answer(place)
