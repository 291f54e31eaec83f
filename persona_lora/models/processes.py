"""Several processes as one: rows are shared out, results come together, one of them writes.

Knows how lists travel between the processes of ``accelerate launch``; refuses to know what they
hold. A single process is the plain case and touches no communication library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from persona_lora.core.runs import Run
from persona_lora.models.hardware import gpu_available

T = TypeVar("T")


class Processes:
    """Where this process stands among all, and how they exchange Python values; here: alone."""

    index = 0
    count = 1

    def gather(self, own: Sequence[Any]) -> list[Any]:
        """Return the lists of all processes, joined in the order of their indices."""
        return list(own)

    def from_main(self, make: Callable[[], T]) -> T:
        """Call ``make`` in process 0 only, and return its value in every process."""
        return make()


class Launched(Processes):
    """The processes that ``accelerate launch`` started."""

    def __init__(self) -> None:
        state = PartialState(cpu=not gpu_available())  # where each would be alone
        self.index = int(state.process_index)
        self.count = int(state.num_processes)

    def gather(self, own: Sequence[Any]) -> list[Any]:
        return list(gather_object(list(own)))

    def from_main(self, make: Callable[[], T]) -> T:
        """An error in process 0 is raised in all: the others must not wait for ever."""
        box: list[Any] = [None, None]
        if self.index == 0:
            try:
                box = [make(), None]
            except Exception as error:  # noqa: BLE001  (it is raised again below, everywhere)
                box = [None, error]
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]


def current_processes(environ: Any) -> Processes:
    """Return the launched processes where ``WORLD_SIZE`` in ``environ`` says so, else one alone."""
    return Launched() if int(environ.get("WORLD_SIZE", "1")) > 1 else Processes()


def recorded(run: Run, processes: Processes) -> AbstractContextManager[object]:
    """Return the run for the first of several processes, and for the others nothing to enter."""
    return run if processes.index == 0 else nullcontext()


def wait_for_all() -> None:
    """Let the processes of a run meet here, wherever they train.

    accelerate's own waits on the GPU of a process's number, also where all train on the CPU.
    """
    state = PartialState()
    if state.num_processes > 1:
        on_gpu = state.device.type != "cpu"
        torch.distributed.barrier(device_ids=[state.local_process_index] if on_gpu else None)
