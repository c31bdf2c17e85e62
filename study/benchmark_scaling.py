"""One training by several processes, compared with one process: a measurement of `bench.py`, and what torchrun runs."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine import RunningMetrics
from model import Model
from run.cli import UserError, end_process, run_command
from run.cores import num_cores
from run.machine import choose_device, keep_freed_memory
from run.ranks import gather, hand_out, num_ranks, run_together
from run.signals import Signals
from study import benchmark_common as common
from study.benchmark_reference import seconds_on

# of an image in pixels, and of the batch of a process: on a CPU so small that the exchange of gradients shows
SIDES, BATCHES = {"cpu": 32, "cuda": 224}, {"cpu": 32, "cuda": 256}
SECONDS = 4.0  # of each measurement, about
RESULT = "scaling.json"


def check_scaling(counts: Sequence[int], device: torch.device) -> None:
    """Raise UserError if there are more processes than GPUs, or than cores where they compute on those."""
    if device.type not in SIDES:
        raise UserError(f"--scaling: several processes train on CPUs and on NVIDIA or AMD GPUs, not on {device.type}")
    available, what = (torch.cuda.device_count(), "GPUs") if device.type == "cuda" else (num_cores(), "cores")
    if max(counts) > available:
        raise UserError(f"--scaling: {max(counts)} processes need as many {what}; this machine has {available}")


def measure_scaling(counts: Sequence[int], device: torch.device) -> dict:
    """Training steps by 1 process and by each of `counts`, each with one core or one GPU and a batch of its own.

    -> {"side" in pixels, "batch_size" of a process, "gradient_mb" that a process exchanges in a step, "processes":
    {number: images/s of all of them, which "alone" exchange nothing, with "no_sync_bn" only gradients, and "together"
    also the statistics of batch norm}}
    """
    processes = {str(count): _rates_of(count, device) for count in sorted({1, *counts})}
    with torch.device("meta"):
        gradients = sum(parameter.nbytes for parameter in Model(common.NUM_CLASSES).parameters())
    return {
        "side": SIDES[device.type],
        "batch_size": BATCHES[device.type],
        "gradient_mb": gradients / 1e6,
        "processes": processes,
    }


def _rates_of(count, device):
    module, root = "study.benchmark_scaling", Path(__file__).resolve().parent.parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = str(SIDES[device.type]), str(BATCHES[device.type]), str(SECONDS)
        command = [*launcher, "-m", module, device.type, *sizes, str(Path(folder, RESULT))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, **pipes)
        try:
            _, errors = process.communicate()
        except BaseException:
            process.terminate()  # torchrun ends its processes
            process.wait()
            raise
        if process.returncode:
            reason = reason_of(errors) or f"status {process.returncode}"
            raise UserError(f"--scaling: the training by {count} processes failed: {reason}")
        return json.loads(Path(folder, RESULT).read_text(encoding="utf-8"))


def reason_of(errors: str) -> str | None:
    """-> the line of what torchrun and its processes printed that says why one of them failed."""
    # what the process says comes first, then torchrun's summary, whose own exception names no reason
    lines = re.findall(r"^error: .*|^[\w.]*(?:Error|Exception): .+|exitcode *: \S.*|^terminate called .*", errors, re.M)
    return next((line for line in lines if "ChildFailedError" not in line), None)


# ------------------------------------------------------------------------------------ in the processes of torchrun


class SameBatch:
    """A loader whose batches are all the same one, on its device already. whole: number of images of all ranks."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor], steps: int, whole: int):
        self.batch, self.steps, self.whole, self.batch_sampler = batch, steps, whole, self

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.steps):
            yield self.batch

    def sizes(self) -> Iterator[int]:
        for _ in range(self.steps):
            yield self.whole


def seconds_per_step(
    device: torch.device,
    side: int,
    batch_size: int,
    seconds: float,
    steps: int | None = None,
    flags: Sequence[str] = (),
) -> float:
    """Seconds of a training step of the present ranks, the median of ROUNDS.

    side: of an image in pixels; batch_size: of each rank; steps: per round, the same on all ranks, None for about
    `seconds`; flags: of main.py.
    """
    everyone = batch_size * num_ranks()
    engine = common.training_engine(device, everyone, flags)
    images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8, device=device)
    batch = images, torch.arange(batch_size, device=device) % common.NUM_CLASSES

    def seconds_of(steps):
        loader = SameBatch(batch, steps, everyone)
        return seconds_on(device, lambda: engine.train_one_epoch(loader, RunningMetrics(0, device))) / steps

    seconds_of(1)  # slower, as the first step
    steps = steps or max(1, round(seconds / seconds_of(2)))
    return statistics.median(seconds_of(steps) for _ in range(common.ROUNDS))


def measure_rank(argv: list[str]) -> int:
    """argv: kind of device, arguments of `seconds_per_step`, file for the result.

    Every process trains by itself first, then all together.
    """
    kind, side, batch_size, seconds, output = argv[0], int(argv[1]), int(argv[2]), float(argv[3]), argv[4]
    keep_freed_memory()  # as main.py does
    own = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    alone = seconds_per_step(own, side, batch_size, seconds)

    def follow(steps):
        device, everyone = choose_device(kind), num_ranks() * batch_size
        rates = {"alone": sum(batch_size / step_seconds for step_seconds in gather(alone))}
        for name, flags in {"no_sync_bn": ["--no-sync_bn"], "together": []}.items():
            is_one = num_ranks() == 1
            step_seconds = alone if is_one else seconds_per_step(device, side, batch_size, seconds, steps, flags)
            rates[name] = everyone / step_seconds
        return rates

    def lead():
        steps = max(1, round(seconds / alone))
        hand_out(steps)
        Path(output).write_text(json.dumps(follow(steps)), encoding="utf-8")
        return 0

    return run_together(lead, follow)


def main() -> int:
    with Signals():
        return run_command(measure_rank, None, in_several_processes=True)


if __name__ == "__main__":
    end_process(main())
