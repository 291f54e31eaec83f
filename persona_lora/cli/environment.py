"""The environment, and what ``.env`` of the working folder adds to it: read here, nowhere else."""

from __future__ import annotations

import os

from dotenv import dotenv_values

from persona_lora.core.errors import UserError

HUB_TOKEN = "HF_TOKEN"


def environment() -> dict[str, str]:
    """Return the environment; what it leaves out, or empty, is taken from ``.env``."""
    try:
        written = dotenv_values(".env")
    except UnicodeDecodeError as error:
        raise UserError(f".env is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    found = {name: value for name, value in written.items() if value}
    return {**found, **{name: value for name, value in os.environ.items() if value}}


def export_hub_token() -> None:
    """Let everything that loads from the hub find the token of ``.env``: it reads only its own."""
    token = environment().get(HUB_TOKEN)
    if token is not None:
        os.environ[HUB_TOKEN] = token
