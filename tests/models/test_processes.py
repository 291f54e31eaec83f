"""Several processes as one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from persona_lora.models import processes as module


@pytest.mark.parametrize(
    ("processes", "device", "waits"), [(2, "cpu", [None]), (2, "cuda:1", [[1]]), (1, "cpu", [])]
)
def test_processes_wait_for_each_other_where_they_train(monkeypatch, processes, device, waits):
    """On the CPU never on the GPU of a process's number: there may be fewer of them."""
    state = SimpleNamespace(
        num_processes=processes, device=torch.device(device), local_process_index=1
    )
    seen = []
    monkeypatch.setattr(module, "PartialState", lambda: state)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: seen.append(device_ids))
    module.wait_for_all()
    assert seen == waits
