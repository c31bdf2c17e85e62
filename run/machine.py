"""The machine: its device, its precision, and its errors in one line."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from run.cli import UserError
from run.ranks import gather, num_ranks, num_ranks_here
from run.surroundings import rank_here

# how the libraries below torch say that the memory of the GPU, or pinned memory for it, is full
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own calls, also in the thread that pins batches; MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "HOST_ALLOCATION_FAILED",
    "unable to find an engine",  # cuDNN, when no algorithm finds room for its work
    "Unable to find a valid cuDNN algorithm",
)


class OutOfMemory(UserError):
    """The memory of the GPU is too small. Its cause is the error of torch."""


def choose_device(name: str) -> torch.device:
    """`--device` -> the device; auto: CUDA, else Apple's MPS, else the CPU. Raises UserError if it is not available."""
    if num_ranks() > 1:
        name = _device_of_rank(name)
    tests = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    try:
        chosen = next(kind for kind, is_available in tests.items() if is_available()) if name == "auto" else name
        device = torch.device(chosen)
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # what is allocated without a device, too
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"--device: {name} is not available here: {str(error).splitlines()[0]}") from error
    if len(kinds := set(gather(device.type))) > 1:
        raise UserError(f"--device: some processes would train on {' and others on '.join(sorted(kinds))}; name one")
    return device


def _device_of_rank(name):
    """-> "cpu", or the GPU of this rank. Raises UserError."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise UserError(
            f"--device: {name} cannot be used by several processes; torchrun gives each its own GPU: pass --device auto"
        )
    if (gpus := torch.cuda.device_count()) < num_ranks_here():
        raise UserError(
            f"--device: this machine has {gpus} GPUs for {num_ranks_here()} processes; start as many: "
            f"torchrun --nproc_per_node={max(1, gpus)}"
        )
    return f"cuda:{rank_here()}"


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


def set_float32_precision(amp_dtype: torch.dtype | None) -> None:
    """Without autocast, convolutions on a GPU are computed in float32 as well: by itself, torch uses TF32 there.

    Matrix products of float32 always are, also where the environment turns TF32 on for them: with it, the updates of
    `Muon` could be many times too long.
    """
    # the older of two settings: torch.export and torch.compile read it, and raise if the newer one differs
    torch.backends.cudnn.allow_tf32 = amp_dtype is not None
    torch.backends.cuda.matmul.allow_tf32 = False


def memory_format(device: torch.device) -> torch.memory_format:
    """-> channels last, which is faster; not on MPS, whose batch normalization raises for it in many versions."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether AdamW is one kernel there in every version of torch that this project supports."""
    return device.type in ("cpu", "cuda")


def random_state(device: torch.device) -> dict[str, Any]:
    """-> `rng_state` of a checkpoint: of the CPU, of the GPU that is trained on, and of MPS if that is the device."""
    on_gpu = device.type == "cuda"
    state = {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if on_gpu else []}
    return state | {"mps": torch.mps.get_rng_state()} if device.type == "mps" else state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """state: by `random_state`, perhaps on another machine. Prints a line if it has none of this kind of device."""
    torch.set_rng_state(state["cpu"])
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])
    elif device.type == "cuda" and state["cuda"]:
        number = torch.cuda.current_device() if device.index is None else device.index
        of_gpus = state["cuda"]  # of all GPUs in older checkpoints
        torch.cuda.set_rng_state(of_gpus[number if number < len(of_gpus) else 0], device)
    elif device.type != "cpu":
        print(
            f"the checkpoint was not trained on {device.type}, and has no random state for it: dropout differs from "
            "that of a training that was not interrupted"
        )


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


def out_of_memory_reason(error: RuntimeError) -> str | None:
    """-> the line that says that the memory of a GPU is too small; None for any other error."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    unnamed = lines[0] if isinstance(error, torch.OutOfMemoryError) else None
    return next((line for line in lines if any(words in line for words in OUT_OF_MEMORY)), unnamed)


@contextmanager
def name_hardware_errors() -> Iterator[None]:
    """Turn errors of the machine into a UserError that says in one line what failed and which flag helps."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [""]
        if full := out_of_memory_reason(error):
            raise OutOfMemory(
                "--batch_size: the memory of the GPU is too small; halve it and double --grad_accum to get the same "
                f"steps ({full})"
            ) from error
        if "DataLoader worker" in lines[0]:
            raise UserError(
                f"--num_workers: a loader worker died, perhaps for lack of memory ({lines[0]}); resume from the last "
                "checkpoint with fewer workers"
            ) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):  # named without importing them
            raise UserError(f"--compile: torch.compile does not work here ({lines[0]}); omit it") from error
        raise
