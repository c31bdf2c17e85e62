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
    set_float32_precision,
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


@pytest.fixture
def gpus(monkeypatch):
    """Stands for 4 GPUs and MPS, whose random states are numbers. -> {device: state}"""
    states = {**{f"cuda:{i}": torch.tensor([i], dtype=torch.uint8) for i in range(4)}, "mps": torch.tensor([9])}
    current = "cuda:0"

    def name(device):
        return current if str(device) == "cuda" else str(device)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[name(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({name(device): state}))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states["mps"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: states.update(mps=state))
    return states


def test_the_random_state_is_that_of_the_own_device_however_many_there_are(gpus, capsys):
    saved = random_state(torch.device("cuda:2"))
    drawn = torch.rand(3)
    for device in ("cuda:0", "cuda", "cuda:3"):
        restore_random_state(saved, torch.device(device))
        assert torch.equal(torch.rand(3), drawn)
    assert [states.item() for states in gpus.values()] == [2, 1, 2, 2, 9] and not capsys.readouterr().out
    of_older_version = {"cpu": saved["cpu"], "cuda": [torch.tensor([10 + i]) for i in range(2)]}
    restore_random_state(of_older_version, torch.device("cuda:1"))
    restore_random_state(of_older_version, torch.device("cuda:3"))
    assert [states.item() for states in gpus.values()] == [2, 11, 2, 10, 9] and not capsys.readouterr().out


def test_the_random_state_of_mps_is_saved_and_restored_only_there(gpus, capsys):
    on_cpu, on_mps = random_state(CPU), random_state(MPS)
    assert set(on_cpu) == {"cpu", "cuda"} and set(on_mps) == {"cpu", "cuda", "mps"}
    gpus["mps"] = torch.tensor([5])
    restore_random_state(on_mps, CPU)
    assert not capsys.readouterr().out and gpus["mps"].item() == 5
    restore_random_state(on_mps, MPS)
    assert not capsys.readouterr().out and gpus["mps"].item() == 9


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_random_state_that_cannot_be_restored_is_one_line(gpus, device, capsys):
    restore_random_state(random_state(CPU), torch.device(device))
    assert capsys.readouterr().out.startswith("the checkpoint was not trained on")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("Caught AcceleratorError in pin memory thread for device 0.\nTraceback:\nCUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, max allowed: 18.13 GB)"),
    ],
)
def test_full_memory_of_a_gpu_is_one_line_in_whatever_words(error):
    with pytest.raises(UserError, match="--batch_size: the memory of the GPU") as caught, name_hardware_errors():
        raise error
    assert "\n" not in str(caught.value) and "Caught" not in str(caught.value)


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), name_hardware_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_float32_means_float32_for_convolutions_too():
    cudnn = torch.backends.cudnn
    set_float32_precision(None)
    assert not cudnn.allow_tf32 and cudnn.conv.fp32_precision != "tf32"
    torch.backends.cuda.matmul.allow_tf32 = True  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does
    set_float32_precision(torch.bfloat16)
    assert cudnn.allow_tf32 and cudnn.conv.fp32_precision == "tf32"
    assert not torch.backends.cuda.matmul.allow_tf32
