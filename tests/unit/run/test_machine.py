"""The device that `--device auto` chooses, and what is computed on it."""

import pytest
import torch

from run import machine
from run.cli import UserError
from run.machine import (
    choose_device,
    has_fused_optimizer,
    memory_format,
    name_hardware_errors,
    random_state,
    resolve_amp,
    restore_random_state,
)

CPU, MPS = torch.device("cpu"), torch.device("mps")


def test_amp_names_a_dtype_and_auto_uses_one_the_device_supports():
    assert [resolve_amp(name, CPU) for name in ("off", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]
    assert resolve_amp("auto", CPU) in (None, torch.bfloat16)
    assert resolve_amp("auto", torch.device("meta")) is None
    assert resolve_amp("auto", MPS) is None and resolve_amp("fp16", MPS) is torch.float16


@pytest.mark.parametrize(
    "available, chosen", [((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda")]
)
def test_auto_is_cuda_then_mps_then_the_cpu(available, chosen, monkeypatch):
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(backend, "is_available", lambda kind=kind: kind in available)
    tried = []
    monkeypatch.setattr(machine.torch, "empty", lambda size, device: tried.append(device.type))
    assert choose_device("auto").type == chosen and tried == [chosen]
    assert choose_device("cpu") == CPU


def test_a_device_that_is_not_there_is_named():
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="--device: mps is not available here"):
            choose_device("mps")


def test_mps_gets_neither_channels_last_nor_a_fused_optimizer():
    assert memory_format(MPS) is torch.contiguous_format and not has_fused_optimizer(MPS)
    for device in (CPU, torch.device("cuda")):
        assert memory_format(device) is torch.channels_last and has_fused_optimizer(device)


def test_the_random_state_of_mps_is_saved_and_restored_only_there(monkeypatch):
    now = [torch.tensor([1, 2], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: now[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", now.append)
    on_cpu, on_mps = random_state(CPU), random_state(MPS)
    assert set(on_cpu) == {"cpu", "cuda"} and set(on_mps) == {"cpu", "cuda", "mps"}
    drawn = torch.rand(3)
    restore_random_state(on_mps, CPU)
    restore_random_state(on_cpu, MPS)  # of a run that was trained elsewhere
    assert len(now) == 1 and torch.equal(torch.rand(3), drawn)
    restore_random_state(on_mps, MPS)
    assert len(now) == 2 and now[1] is on_mps["mps"]


def test_full_memory_of_mps_is_named_as_that_of_a_gpu():
    with pytest.raises(UserError, match="--batch_size"), name_hardware_errors():
        raise RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, max allowed: 18.13 GB)")
