"""The machine: its device, its precision, and its errors in one line."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from run.cli import UserError


def choose_device(name: str) -> torch.device:
    """`--device` -> the device; auto: CUDA, else Apple's MPS, else the CPU. Raises UserError if it is not available."""
    tests = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    try:
        chosen = next(kind for kind, is_available in tests.items() if is_available()) if name == "auto" else name
        device = torch.device(chosen)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"--device: {name} is not available here: {str(error).splitlines()[0]}") from error
    return device


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """`--amp` -> the dtype of autocast, None for float32.

    auto: bfloat16 where the device supports it natively, float16 on older GPUs, else float32.
    """
    if amp != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and _cpu_computes_bf16():
        return torch.bfloat16
    return None


def memory_format(device: torch.device) -> torch.memory_format:
    """-> channels last, which is faster; not on MPS, whose batch normalization raises for it in many versions."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether AdamW is one kernel there in every version of torch that this project supports."""
    return device.type in ("cpu", "cuda")


def random_state(device: torch.device) -> dict[str, Any]:
    """-> `rng_state` of a checkpoint: of the CPU, of each GPU, and of MPS if that is the device."""
    state = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    return state | {"mps": torch.mps.get_rng_state()} if device.type == "mps" else state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """state: by `random_state`, perhaps on another machine, whose GPUs or MPS are then left as they are."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def _cpu_computes_bf16():
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next step instead of returning it to the system.

    On a CPU each step allocates gigabytes of activations, and every 4 kB of new memory costs a page fault: a tenth to
    a quarter of the time of a step. Needs up to a quarter more memory, which is packed less tightly.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # large blocks come from the kept memory too


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the memory of a GPU was too small."""
    return isinstance(error, torch.OutOfMemoryError) or str(error).strip().startswith("MPS backend out of memory")


@contextmanager
def name_hardware_errors() -> Iterator[None]:
    """Turn errors of the machine into a UserError that says in one line what failed and which flag helps."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if is_out_of_memory(error):
            raise UserError(
                "--batch_size: the memory of the GPU is too small; halve it and double --grad_accum to get the same "
                f"steps ({reason})"
            ) from error
        if "DataLoader worker" in reason:
            raise UserError(
                f"--num_workers: a loader worker died, perhaps for lack of memory ({reason}); resume from the last "
                "checkpoint with fewer workers"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # named without importing them
            raise UserError(f"--compile: torch.compile does not work here ({reason}); omit it") from error
        raise
