"""Every kind of machine, by simulating what torch answers about it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from persona_lora.core.errors import UserError
from persona_lora.models import hardware
from persona_lora.models.hardware import (
    Launch,
    computes_in_bfloat16,
    resolve_dtype,
    training_hardware,
    weight_arguments,
)
from persona_lora.models.load_options import LoadOptions
from persona_lora.models.loading import load_chat_model

CPU, BF16, GPU = "cpu", "cpu with avx512_bf16", "gpu"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 900),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "700"}, 700 - 300 + 40),
        ("0::/only/outside", {"memory.max": "2000"}, 900),
        ("0::/only/outside", {"memory.max": "310"}, 50),
        ("4:cpu:/a\n3:memory:/a", {"memory/a/memory.limit_in_bytes": "500"}, 500 - 200 + 30),
        ("4:cpu:/a", {"memory/a/memory.limit_in_bytes": "500"}, 900),
    ],
)
def test_cached_files_are_free_memory_and_a_container_s_limit_holds(
    monkeypatch, tmp_path, groups, files, expected
):
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text(groups)
    for name, value in files.items():
        folder = (root / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(value + "\n")
        (folder / "memory.current").write_text("300\n")
        (folder / "memory.usage_in_bytes").write_text("200\n")
        (folder / "memory.stat").write_text("inactive_file 40\ntotal_inactive_file 30\n")
    monkeypatch.setattr(hardware, "CGROUPS", root)
    monkeypatch.setattr(hardware, "OWN_GROUPS", own)
    machine = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=900))
    monkeypatch.setattr(hardware, "psutil", machine)
    assert hardware.free_memory(torch.device("cpu")) == expected
    own.unlink()
    assert hardware.free_memory(torch.device("cpu")) == 900


@pytest.mark.parametrize(
    ("machine", "here", "on_cpu"),
    [
        ("cpu", False, False),
        ("cpu with avx512_bf16", True, True),
        ("cpu with amx_bf16", True, True),
        ("old gpu", False, True),
        ("gpu", True, False),
    ],
)
def test_weights_are_bf16_where_there_are_units_for_it(simulate_machine, machine, here, on_cpu):
    simulate_machine(machine)
    assert (computes_in_bfloat16(), computes_in_bfloat16(on_cpu=True)) == (here, on_cpu)
    assert resolve_dtype("auto") is (torch.bfloat16 if here else torch.float32)
    assert resolve_dtype("float16") is torch.float16


@pytest.mark.parametrize(
    ("machine", "asked", "launch", "expected"),
    [
        # machine, (use_cpu, bf16, fp16), launched with: use_cpu, bf16, fp16
        (CPU, (None, None, False), Launch(), (True, False, False)),
        (BF16, (None, None, False), Launch(), (True, True, False)),
        ("old gpu", (None, None, False), Launch(), (False, False, False)),
        (GPU, (None, None, False), Launch(), (False, True, False)),
        # What was asked for is what runs.
        (CPU, (None, True, False), Launch(), (True, True, False)),
        (BF16, (None, False, False), Launch(), (True, False, False)),
        (GPU, (True, None, False), Launch(), (True, False, False)),
        ("old gpu", (True, None, False), Launch(), (True, True, False)),
        (GPU, (False, False, False), Launch(), (False, False, False)),
        (GPU, (None, None, True), Launch(), (False, False, True)),
        ("old gpu", (None, True, False), Launch(), (False, True, False)),
        # What accelerate was told is what runs, too.
        (GPU, (None, None, False), Launch(use_cpu=True), (True, False, False)),
        (CPU, (None, None, False), Launch(mixed_precision="bf16"), (True, True, False)),
        (GPU, (None, None, False), Launch(mixed_precision="fp16"), (False, False, True)),
        (GPU, (None, True, False), Launch(mixed_precision="bf16"), (False, True, False)),
    ],
)
def test_training_hardware(simulate_machine, machine, asked, launch, expected):
    simulate_machine(machine)
    use_cpu, bf16, fp16 = asked
    assert training_hardware(use_cpu=use_cpu, bf16=bf16, fp16=fp16, launch=launch) == expected


@pytest.mark.parametrize(
    ("machine", "asked", "launch", "message"),
    [
        (BF16, (False, None, False), Launch(), "there is no GPU here"),
        (GPU, (False, None, False), Launch(use_cpu=True), "launched on the CPU"),
        (CPU, (None, None, True), Launch(), "fp16 mixed precision needs a GPU; use bf16"),
        (GPU, (True, None, True), Launch(), "fp16 mixed precision needs a GPU; use bf16"),
        (CPU, (None, None, False), Launch(mixed_precision="fp16"), "fp16 mixed precision needs"),
        (GPU, (None, True, True), Launch(), "exclude each other"),
        (GPU, (None, False, False), Launch(mixed_precision="bf16"), "leave one of the two out"),
        (GPU, (None, True, False), Launch(mixed_precision="fp16"), "leave one of the two out"),
        (GPU, (None, None, False), Launch(mixed_precision="fp8"), "mixed precision fp8"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_with_the_remedy(
    simulate_machine, machine, asked, launch, message
):
    simulate_machine(machine)
    use_cpu, bf16, fp16 = asked
    with pytest.raises(UserError, match=message):
        training_hardware(use_cpu=use_cpu, bf16=bf16, fp16=fp16, launch=launch)


def test_a_gpu_without_any_bf16_refuses_it(simulate_machine, monkeypatch):
    simulate_machine("old gpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UserError, match="does not know bf16"):
        training_hardware(use_cpu=None, bf16=True, fp16=False, launch=Launch())


@pytest.mark.parametrize(("machine", "dtype"), [(CPU, torch.float32), (BF16, torch.bfloat16)])
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_models_load_in_the_type_that_the_cpu_computes_in(
    simulate_machine, model_folder, machine, dtype, device_map
):
    simulate_machine(machine)
    assert load_chat_model(str(model_folder), device_map=device_map).model.dtype is dtype


def test_a_model_kept_on_the_cpu_beside_a_gpu_has_the_type_of_the_cpu(
    simulate_machine, model_folder
):
    simulate_machine("gpu")
    assert load_chat_model(str(model_folder), device_map="cpu").model.dtype is torch.float32


@pytest.mark.parametrize(
    ("launched", "machine", "device", "wanted", "placed"),
    [
        ("2", "gpu", "cuda:1", None, "cuda:1"),
        ("2", "gpu", "cuda:1", "cpu", "cpu"),
        ("2", "gpu", "cpu", None, "cpu"),  # launched on the CPU, beside a GPU
        ("2", "cpu", "cpu:0", None, "cpu"),
        ("1", "gpu", "cuda:0", None, "auto"),
    ],
)
def test_each_of_several_processes_has_one_device(
    simulate_machine, monkeypatch, launched, machine, device, wanted, placed
):
    simulate_machine(machine)
    monkeypatch.setenv("WORLD_SIZE", launched)
    state = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(hardware, "PartialState", lambda cpu: state)
    assert weight_arguments(LoadOptions(device_map=wanted))["device_map"] == placed


@pytest.mark.parametrize("wanted", ["auto", "balanced", "cuda:0"])
def test_one_of_several_processes_takes_no_device_of_another(simulate_machine, monkeypatch, wanted):
    simulate_machine("gpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = SimpleNamespace(device=torch.device("cuda:1"))
    monkeypatch.setattr(hardware, "PartialState", lambda cpu: state)
    with pytest.raises(UserError, match=f"{wanted}.*cuda:1.*leave it out"):
        weight_arguments(LoadOptions(device_map=wanted))
