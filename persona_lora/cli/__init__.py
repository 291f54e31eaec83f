"""The command line: one function per command that parses, calls the library once, and prints.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from persona_lora.cli import (  # noqa: F401  (each makes its commands known)
    comparison_commands,
    data_commands,
    drift_commands,
    judge_commands,
    persona_commands,
    protocol_commands,
    run_commands,
    serving_commands,
    steering_commands,
)
from persona_lora.cli.program import app, main

__all__ = ["app", "main"]
