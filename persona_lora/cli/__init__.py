"""The command line: one function per command that parses, calls the library once, and prints.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from persona_lora.cli import (
    benchmarking,
    checkpoints,
    comparing,
    data,
    exporting,
    measuring,
    optimizing,
    persona_commands,
    playground,
    projecting,
    training,
    vectors,
)
from persona_lora.cli.program import app, main

__all__ = [
    "app",
    "benchmarking",
    "checkpoints",
    "comparing",
    "data",
    "exporting",
    "main",
    "measuring",
    "optimizing",
    "persona_commands",
    "playground",
    "projecting",
    "training",
    "vectors",
]
