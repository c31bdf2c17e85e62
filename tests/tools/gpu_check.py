"""Check main.py on a GPU and measure how fast it is there, in parts: each a process with a time limit.

    python tests/tools/gpu_check.py --out DIR              on a machine with a GPU (less than 6 minutes)
    python tests/tools/gpu_check.py --device cpu --tiny    dry run without a GPU; what needs one is skipped

Parts that only check run side by side, those that measure one after the other. With several GPUs, one training on all
of them is measured too. Does without wandb, optuna and sqlalchemy. Every result is written at once, so that a run that
is killed leaves what it has measured in DIR/gpu_check.jsonl.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import torch
from thin_main import thin_resnet50
from torch.profiler import ProfilerActivity, profile

import batch_search
import parallel
import resnet_custom
from dataset_double import AugmentedSkinDataset, DoubleSkinDataset, EpochSampler, make_loader, to_tensor
from engine import Engine, Mixer, RunningMetrics
from flag_checks import parse_flags
from flags import AUGMENTATIONS, TRAIN_LOSSES
from images.augment import IDENTITY, augment, augment_batch, draw_parameters, resize
from images.cache import ImageCache
from images.demo import draw_patch
from images.device_batches import DeviceBatches
from images.folders import ImageIndex, Paths
from main import main as run_main
from model import Model, load_checkpoint
from muon import Muon
from resume import snapshot
from run import ranks
from run.files import read_rows
from run.machine import random_state, resolve_amp, set_float32_precision
from run.progress import Progress
from run.saver import BEST, LAST, Saver
from run.signals import CALL, Signals
from utils import build_loss

os.environ["WANDB_MODE"] = "disabled"
ROOT = Path(__file__).resolve().parents[2]
# part: its time limit in seconds. Parts of a phase run side by side; the most important phases come first
PHASES = (
    {"correct": 90, "resume": 120, "ranks": 100, "compile": 110},
    {"auto": 30},
    {"save": 20},
    {"bench": 120},
    {"speed": 50},
    {"compiled": 60},  # what compile has compiled is in torch's cache of compiled code
    {"input": 40},
)
PARTS = {part: limit for phase in PHASES for part, limit in phase.items()}
# images/s on an H100, derived from published speeds: see docs/speed.md
AIMS = {"training": 3000, "compiled": 3700, "evaluation": 8000}
BF16_PEAK = 989e12  # FLOP/s, dense, from the data sheet of the H100 SXM
GFLOP = 37.0  # forward and backward pass of an image at 224 px (study.benchmark.gflop_per_image)
SAMPLES_PER_CLS = (1000, 500, 200, 100, 50, 30, 20)
NUM_CLASSES = len(SAMPLES_PER_CLS)
KERNEL_KINDS = {  # words in the names of CUDA kernels
    "batch norm": ("batch_norm", "bn_"),
    "convolution": ("conv", "gemm", "wgrad", "dgrad", "fprop", "xmma", "cutlass", "implicit"),
    "optimizer": ("multi_tensor",),
    "copies": ("copy", "memcpy"),
}


class Log:
    """Prints each result, and appends it to a file of JSON lines."""

    def __init__(self, path, part):
        self.path, self.part = Path(path), part

    def __call__(self, name, ok=None, **values):
        """ok: whether a check passed; None for a measurement."""
        ok = None if ok is None else bool(ok)  # a bool of numpy would be neither True nor False
        row = {"part": self.part, "name": name, "ok": ok, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        mark = {True: "ok  ", False: "FAIL", None: "    "}[ok]
        print(f"{mark} {self.part:8} {name}: {described(values)}", flush=True)

    @contextlib.contextmanager
    def guarded(self, name):
        """A context in which an exception is a failed check."""
        try:
            yield
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self(name, False, error=f"{type(error).__name__} {str(error)[:300]}", at=where)


def described(values):
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def image_batch(count, side, seed=0):
    """-> images (N, 3, side, side) uint8 noise, targets (N,)"""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return to_tensor(pixels), torch.arange(count) % NUM_CLASSES


def new_engine(device, amp=None, loss="cb", lr=1e-4, dropout=0.0, optimizer=torch.optim.AdamW, **options):
    """-> Engine as main.py builds it, with the same initial weights each time"""
    torch.manual_seed(0)
    model = Model(NUM_CLASSES, dropout, cosine_head=loss == "ldam")
    engine = Engine(model, build_loss(loss, SAMPLES_PER_CLS), device, amp, **{"clip_grad": 1.0, **options})
    engine.optimizer = optimizer(engine.model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda step: 1)
    engine.model.train()
    return engine


def run_step(engine, batch, metrics, size=None):
    """One optimizer step of an engine that is alone."""
    engine._step([(batch, None)], metrics, size)


def logits_and_loss(engine, images, targets):
    logits, _, loss = engine._logits_and_loss(images, targets, len(targets))
    return logits, loss


def gradient_of(model):
    """-> (N,) all gradients"""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def relative_error(expected, actual):
    expected, actual = (tensor.detach().double().cpu() for tensor in (expected, actual))
    return float((expected - actual).norm() / expected.norm())


def reaches(device, rate, aim):
    """-> whether a rate on an H100 is what was aimed at; None elsewhere"""
    is_h100 = device.type == "cuda" and "H100" in torch.cuda.get_device_name(device)
    return rate >= AIMS[aim] if is_h100 else None


@contextlib.contextmanager
def no_host_sync(log, name):
    """A context in which an operation that makes the host wait for the GPU is a failed check."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        log(f"no host sync: {name}", True)
    except RuntimeError as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        log(f"no host sync: {name}", False, at=frames[-3:], error=str(error)[:100])
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------------------------------------- correct


def part_correct(log, device, tiny):
    """The same results as on the CPU, no step that makes the host wait, no memory left behind."""
    is_gpu = device.type == "cuda"
    amp = resolve_amp("auto", device)
    log("amp auto", amp is torch.bfloat16 if is_gpu else None, dtype=amp)
    side = 32 if tiny else 64
    for check in (check_float32, check_losses, check_augmentation, check_batch_order, check_average):
        with log.guarded(check.__name__):
            check(log, device, side)
    for dtype in (None, torch.bfloat16, torch.float16):
        with log.guarded(f"learns in {dtype}"):
            check_learning(log, device, side, dtype, *((2, 3) if tiny else (4, 10)))
    with log.guarded("float16 overflow"):
        check_overflow(log, device, side)
    if is_gpu:
        check_host_syncs(log, device, side)
        check_reserved_memory(log, device)


def check_float32(log, device, side):
    # TF32 off: the question is whether the code is right, not how exact the format is
    set_float32_precision(None)
    torch.backends.cudnn.deterministic = True
    images, targets = image_batch(16, side)
    results = []
    for place in (torch.device("cpu"), device):
        engine = new_engine(place)
        logits, loss = logits_and_loss(engine, images.to(place), targets.to(place))
        loss.backward()
        results.append((logits, loss, gradient_of(engine.model)))
    set_float32_precision(torch.bfloat16)
    errors = list(map(relative_error, *results))
    ok = errors[0] < 1e-4 and errors[1] < 1e-4 and errors[2] < 2e-2
    log("float32 as on the CPU", ok, **dict(zip(("logits", "loss", "gradient"), errors, strict=True)))


def check_losses(log, device, side):
    logits, targets = torch.randn(64, NUM_CLASSES), torch.arange(64) % NUM_CLASSES
    worst = 0.0
    for name in TRAIN_LOSSES:
        criterion = build_loss(name, SAMPLES_PER_CLS)
        expected = criterion(logits, targets).item()
        error = abs(criterion.to(device)(logits.to(device), targets.to(device)).item() - expected)
        worst = max(worst, error / abs(expected))
    log("losses as on the CPU", worst < 1e-5, worst=worst)


def check_augmentation(log, device, side):
    images, _ = image_batch(32, 224)
    rng = np.random.default_rng(1)
    drawn = [IDENTITY, *(draw_parameters(AUGMENTATIONS, rng) for _ in range(31))]
    parameters = torch.tensor(drawn, dtype=torch.float32)
    expected = augment_batch(images, parameters)
    augmented = augment_batch(images.to(device), parameters.to(device)).cpu()
    gap = (expected.int() - augmented.int()).abs()
    ok = gap.max().item() <= 1 and torch.equal(augmented[0], images[0])
    log("augment_batch as on the CPU", ok, largest=gap.max().item(), share=gap.bool().float().mean().item())

    smooth = torch.nn.functional.avg_pool2d(images.float(), 9, 1, 4).to(torch.uint8)
    augmented = augment_batch(smooth.to(device), parameters.to(device)).cpu().permute(0, 2, 3, 1).contiguous().numpy()
    by_opencv = np.empty_like(augmented)
    pixels = smooth.permute(0, 2, 3, 1).contiguous().numpy()
    for out, image, of_image in zip(by_opencv, pixels, parameters.double().tolist(), strict=True):
        augment(image, tuple(of_image), out=out)
    gap = np.abs(by_opencv.astype(int) - augmented.astype(int))
    values = {"mean": float(gap.mean()), "p99": float(np.percentile(gap, 99)), "largest": int(gap.max())}
    log("augment_batch as OpenCV", gap.mean() < 0.5, **values)

    expected, resized = resize(images, 112), resize(images.to(device), 112).cpu()
    ok = (expected.int() - resized.int()).abs().max().item() <= 1
    log("resize as on the CPU", ok, share=(expected != resized).float().mean().item())


def check_batch_order(log, device, side):
    is_gpu = device.type == "cuda"
    batches = [image_batch(8, 32, seed) for seed in range(40)]
    if is_gpu:
        batches = [tuple(tensor.pin_memory() for tensor in batch) for batch in batches]
    arrived = []
    for batch in DeviceBatches(batches, device):
        if is_gpu:
            torch.cuda._sleep(2_000_000)  # the host runs far ahead of the device
        arrived.append([tensor.clone() for tensor in batch])
    pairs = zip(arrived, batches, strict=True)
    ok = all(torch.equal(a.cpu(), b) for batch in pairs for a, b in zip(*batch, strict=True))
    log("batches arrive whole and in order", ok)


def check_average(log, device, side):
    """--ema: the averaged weights are those that the CPU computes from the same weights."""
    engines = [new_engine(place, ema=0.999) for place in (torch.device("cpu"), device)]
    for _ in range(3):
        for engine in engines:
            with torch.no_grad():
                for parameter in engine.model.parameters():
                    parameter.mul_(1.1)
            engine.average.update()
    vectors = [torch.cat([p.detach().flatten() for p in engine.evaluated.parameters()]) for engine in engines]
    error = relative_error(*vectors)
    log("averaged weights as on the CPU", error < 1e-6, error=error)


def check_learning(log, device, side, amp, epochs, steps):
    engine = new_engine(device, amp, "ce", 3e-4, dropout=0.1)
    images, targets = image_batch(32, side)
    images += (targets * 20).to(images.dtype)[:, None, None, None]
    rows = [engine.train_one_epoch([(images, targets)] * steps, RunningMetrics(e, device)) for e in range(epochs)]
    first, last = rows[0]["train_loss"], rows[-1]["train_loss"]
    log(f"learns in {amp}", last < first, first=first, last=last, scale=engine.scaler.get_scale())


def check_overflow(log, device, side):
    engine = new_engine(device, torch.float16, "ce")
    engine.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    before = engine.model.head.weight.detach().clone()
    images, targets = (tensor.to(device) for tensor in image_batch(16, side))
    run_step(engine, (images, targets), RunningMetrics(0, device))
    ok = torch.equal(before, engine.model.head.weight) and engine.scaler.get_scale() == 2.0**39
    engine.check_weights()
    log("float16 overflow skips the step and halves the scale", ok)


def check_host_syncs(log, device, side):
    """No operation of a step makes the host wait for the GPU."""
    configs = {
        "plain": {}, "no clipping": {"clip_grad": 0.0}, "float16": {"amp": torch.float16}, "ema": {"ema": 0.999},
        "mixup": {"mixer": Mixer(0.4, 1.0)}, "resized": {"size": 48}, "ldam": {"loss": "ldam"},
        "ordinal": {"loss": "ordinal"}, "muon": {"optimizer": Muon},
    }  # fmt: skip
    images, targets = (tensor.to(device) for tensor in image_batch(16, side))
    parameters = torch.tensor([IDENTITY] * 16, device=device)
    for name, options in configs.items():
        options = {"amp": torch.bfloat16, **options}
        size = options.pop("size", None)
        engine, metrics = new_engine(device, **options), RunningMetrics(0, device)
        for _ in range(2):
            run_step(engine, (augment_batch(images, parameters), targets), metrics, size)
        with no_host_sync(log, name):
            run_step(engine, (augment_batch(images, parameters), targets), metrics, size)


def check_reserved_memory(log, device):
    """Epochs leave no memory behind."""
    gc.collect()
    torch.cuda.empty_cache()
    reserved = []
    batch = tuple(tensor.pin_memory() for tensor in (*image_batch(128, 224), torch.tensor([IDENTITY] * 128)))
    for _ in range(12):
        for _ in DeviceBatches([batch] * 4, device):
            pass
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    ok = reserved[-1] <= 1.2 * reserved[1]
    log("reserved memory is the same after every epoch", ok, mib=[round(mib) for mib in reserved])


# ------------------------------------------------------------------------------------------------------------ resume


def part_resume(log, device, tiny):
    """main.py in this process: run twice, interrupted and resumed, out of memory, with and without workers."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        runs = Runs(Path(work), device)
        everything = ["--use_augmentation", "--augment_all", "--mixup", 0.2, "--ema", 0.99, "--grad_accum", 2]
        everything += ["--optimizer", "muon"]
        configs = {
            # on a CPU, a backward pass in float16 takes 50 times as long
            "fp16 with everything": ["--amp", "fp16" if device.type == "cuda" else "bf16", *everything],
            "bf16": ["--amp", "bf16", "--use_augmentation"],
        }
        for name, flags in list(configs.items())[: 1 if tiny else None]:
            with log.guarded(name):
                check_resume(log, runs, name, flags)
        if device.type == "cuda":
            with log.guarded("out of memory"):
                check_out_of_memory(log, runs)
        with log.guarded("end"):
            check_end(log, runs, device, tiny)
        with log.guarded("workers"):
            for workers in (0, 2):
                runs.start(f"workers_{workers}", "--amp", "bf16", "--num_workers", workers, "--use_augmentation")
            differing = runs.differing("workers_0", "workers_2")
            log("the results do not depend on the number of workers", not differing, differing=differing[:4])


class Runs:
    """Trainings of main.py in this process, on small drawn images; they can be stopped after a number of steps."""

    def __init__(self, work, device):
        self.work, self.device, self._steps_left = work, device, 0
        for grade, count in enumerate((60, 30, 20)):
            folder = work / "data" / str(grade)
            folder.mkdir(parents=True)
            for number in range(count):
                patch = draw_patch(grade, np.random.default_rng((grade, number)), 72)
                cv2.imwrite(str(folder / f"{number}.png"), patch)
        real_step = Engine._step

        def step(engine, *args):
            real_step(engine, *args)
            self._steps_left -= 1
            if self._steps_left == 0:
                signal.raise_signal(signal.SIGTERM)

        Engine._step = step
        self.cache_flags = ["--cache_dir", work / "cache"]
        self.data_flags = ["--data_dirs", work / "data", "--no-pretrained", "--image_size", 64]
        self.data_flags += ["--batch_size", 16, "--epochs", 2]

    def new_run_flags(self, name, lr):
        return [*self.data_flags, "--lr", lr, "--run_dir", self.work / name]

    def start(self, name, *flags, stop_after=0, lr=1e-3):
        """-> exit status. stop_after: number of optimizer steps, 0 for all."""
        self._steps_left = stop_after
        shared = [*self.cache_flags, "--num_workers", 2, "--device", self.device]
        if "--resume" not in flags:
            shared += self.new_run_flags(name, lr)
        return run_main([str(flag) for flag in (*shared, *flags)])

    def start_ranks(self, tiny, *flags):
        """Two processes of torchrun on the same GPU. -> CompletedProcess"""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        program = [ROOT / "tests/tools/ranks_on_one_gpu.py", *["thin"] * tiny]
        command = [*launcher, *program, *self.cache_flags, "--device", self.device.type, *flags]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    def differing(self, first, second):
        """-> names of what differs between the last checkpoints of two runs"""
        a, b = (load_checkpoint(self.work / name / "last_model.pth") for name in (first, second))
        names = [k for k, v in a["model_state_dict"].items() if not torch.equal(v, b["model_state_dict"][k])]
        for key, state in a["optimizer_state_dict"]["state"].items():
            other = b["optimizer_state_dict"]["state"][key]
            names += [f"optimizer {key} {k}" for k, v in state.items() if not torch.equal(v, other[k])]
        for kind in ("cpu", "cuda"):
            states = [c["rng_state"][kind] if kind == "cuda" else [c["rng_state"][kind]] for c in (a, b)]
            names += [f"random state {kind}"] * (not all(map(torch.equal, *states)))
        times = ("seconds", "images_per_second", "input_wait")
        rows = [[{k: v for k, v in row.items() if k not in times} for row in c["history"]] for c in (a, b)]
        return names + ["history"] * (rows[0] != rows[1])


def check_resume(log, runs, name, flags):
    started = time.perf_counter()
    statuses = runs.start(f"{name}_a", *flags), runs.start(f"{name}_b", *flags)
    seconds = (time.perf_counter() - started) / 2
    differing = runs.differing(f"{name}_a", f"{name}_b") if statuses == (0, 0) else ["exit status"]
    log(f"{name}: two runs are equal bit for bit", not differing, seconds=seconds, differing=differing[:4])

    stopped = runs.start(f"{name}_c", *flags, stop_after=3)
    resumed = runs.start(f"{name}_c", "--resume", runs.work / f"{name}_c" / "last_model.pth")
    statuses = stopped, resumed
    differing = runs.differing(f"{name}_a", f"{name}_c") if statuses == (143, 0) else ["exit status"]
    log(f"{name}: stopped and resumed, equal bit for bit", not differing, status=statuses, differing=differing[:4])


def check_out_of_memory(log, runs):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = runs.start("large", "--batch_size", 100, "--image_size", 512)
    torch.cuda.set_per_process_memory_fraction(1.0)
    ok = status == 2 and "--batch_size" in errors.getvalue()
    log("out of memory is one line that names --batch_size", ok, stderr=errors.getvalue()[-160:])


def check_end(log, runs, device, tiny):
    """main.py in its own process, with as many workers as a user gets, ends soon after its last line."""
    program = ROOT / ("tests/tools/thin_main.py" if tiny else "main.py")
    flags = [*runs.cache_flags, *runs.data_flags, "--device", device, *["--num_workers", 2] * tiny]
    command = [str(word) for word in (sys.executable, "-u", program, *flags, "--run_dir", runs.work / "ends")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = math.nan
    for line in process.stdout:
        if line.startswith("results saved to"):
            done = time.perf_counter()
    errors = process.stderr.read()
    status, seconds = process.wait(), time.perf_counter() - done
    ok = status == 0 and seconds < 8 and "Traceback" not in errors
    log("a finished run ends at once, without errors", ok, seconds=seconds, status=status, stderr=errors[-200:])


# ------------------------------------------------------------------------------------------------------------- speed


def timed(step, steps, device, rounds=3):
    """-> (seconds per step, median of the rounds; seconds that the host needs to launch one)"""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    whole, host = [], []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        step()
        step()  # two steps do not fill the queue of launches
        host.append((time.perf_counter() - started) / 2)
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        whole.append((time.perf_counter() - started) / steps)
    return statistics.median(whole), min(host)


def speed_values(images, seconds, host):
    rate = images / seconds
    share = rate * GFLOP * 1e9 / BF16_PEAK
    return {"images_s": rate, "ms_per_step": 1e3 * seconds, "ms_host": 1e3 * host, "mfu_of_989": share}


def matrix_peak(log, device, tiny):
    """-> FLOP/s of a bfloat16 matrix product"""
    n = 512 if tiny else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    seconds, _ = timed(lambda: a @ b, 10, device)
    source = torch.empty((1 << 20) if tiny else (1 << 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds, _ = timed(lambda: target.copy_(source), 10, device)
    peak = 2 * n**3 / seconds
    log("peaks", bf16_tflops=peak / 1e12, copy_tb_s=2 * source.numel() / copy_seconds / 1e12)
    return peak


def part_speed(log, device, tiny):
    """Training steps on images that are on the device already."""
    peak = matrix_peak(log, device, tiny)
    cudnn, bf16 = torch.backends.cudnn, torch.bfloat16
    cudnn.deterministic = True  # as in main.py
    for batch in (2,) if tiny else (32, 256):
        measure_step(log, device, tiny, peak, f"bf16, batch {batch}", batch, bf16)
        measure_step(log, device, tiny, peak, f"bf16, batch {batch}, ema", batch, bf16, ema=0.999)
    if device.type != "cuda" or tiny:
        return
    set_float32_precision(None)  # as in main.py --amp off
    measure_step(log, device, tiny, peak, "float32, batch 128", 128, None, steps=8)
    set_float32_precision(bf16)
    cudnn.benchmark, cudnn.deterministic = True, False
    measure_step(log, device, tiny, peak, "bf16, batch 256, benchmark True, deterministic False", 256, bf16)
    cudnn.benchmark, cudnn.deterministic = False, True
    with log.guarded("profile"):
        profile_step(log, device)
    with log.guarded("CUDA graph"):
        measure_captured_step(log, device, 32)


def measure_step(log, device, tiny, peak, name, batch, amp, steps=None, **options):
    with log.guarded(name):
        engine = new_engine(device, amp, dropout=0.3, **options)
        images, targets = (tensor.to(device) for tensor in image_batch(batch, 32 if tiny else 224))
        metrics = RunningMetrics(0, device)

        def step():
            run_step(engine, (images, targets), metrics)
            if metrics.unchecked >= 10:
                metrics.check()

        for _ in range(1 if tiny else 4):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = 2 if tiny else steps or max(6, min(40, 4000 // batch))
        values = speed_values(batch, *timed(step, steps, device, 1 if tiny else 3))
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        log(name, **values, mfu_of_measured=values["images_s"] * GFLOP * 1e9 / peak, gib=memory)


def profile_step(log, device):
    engine, metrics = new_engine(device, torch.bfloat16, dropout=0.3), RunningMetrics(0, device)
    batch = tuple(tensor.to(device) for tensor in image_batch(256, 224))
    for _ in range(3):
        run_step(engine, batch, metrics)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(2):
            run_step(engine, batch, metrics)
        torch.cuda.synchronize()
    kernels = [(e.self_device_time_total / 2e3, e.count // 2, e.key[:70]) for e in profiled.key_averages()]
    kinds = {}
    for ms, _, key in kernels:
        kind = next(
            (kind for kind, words in KERNEL_KINDS.items() if any(w in key.lower() for w in words)), "elementwise"
        )
        kinds[kind] = round(kinds.get(kind, 0) + ms, 3)
    log("profile, ms per step at batch 256", **kinds, kernels=sum(count for _, count, _ in kernels))
    for ms, count, key in sorted(kernels, reverse=True)[:12]:
        log("kernel", ms=ms, count=count, key=key)


def measure_captured_step(log, device, batch):
    """What a step in a CUDA graph would reach where launching kernels is the limit."""
    engine = new_engine(device, torch.bfloat16, dropout=0.3)
    images, targets = (tensor.to(device) for tensor in image_batch(batch, 224))
    parameters = list(engine.model.parameters())
    engine.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=True)

    def step():
        engine.optimizer.zero_grad(set_to_none=True)
        logits_and_loss(engine, images, targets)[1].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        engine.optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    seconds, _ = timed(graph.replay, 30, device)
    log(f"captured step, batch {batch}", images_s=batch / seconds, ms_per_step=1e3 * seconds)


# ------------------------------------------------------------------------------------------------------------- input


def part_input(log, device, tiny):
    """From the cache of decoded images to the trained step."""
    torch.backends.cudnn.deterministic = True
    side, count = (32, 64) if tiny else (224, 4096)
    log("machine", cores=os.cpu_count(), shm_gib=shutil.disk_usage("/dev/shm").total // 2**30)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        originals = DoubleSkinDataset(cached_noise(Path(work), side, count), side)
        dataset = AugmentedSkinDataset(originals, 1, on_device=device.type == "cuda", augment_all=True)
        for workers in (0, 1) if tiny else (0, 2, 8):
            batch = 8 if tiny else 256
            with log.guarded(f"loader alone, batch {batch}, {workers} workers"):
                measure_loader(log, device, dataset, batch, workers)
        for batch, workers in ((8, 0),) if tiny else ((256, 0), (32, 0), (256, 8)):
            with log.guarded(f"an epoch, batch {batch}, {workers} workers"):
                measure_epochs(log, device, dataset, batch, workers)


def cached_noise(folder, side, count):
    """-> ImageIndex whose images are noise in a cache of decoded images"""
    noise = np.random.default_rng(0).integers(0, 256, (64, side, side, 3), dtype=np.uint8)
    with open(folder / "noise.pixels", "wb") as file:
        for _ in range(count // 64):
            file.write(noise)
    cache = ImageCache(folder, side)
    cache.folder, cache._pixel_file, cache._shape = folder, "noise.pixels", (count, side, side, 3)
    paths, classes = Paths(f"/d/{i % NUM_CLASSES}/{i}.jpg" for i in range(count)), [str(c) for c in range(NUM_CLASSES)]
    return ImageIndex(paths, np.arange(count) % NUM_CLASSES, classes, np.arange(count), cache)


def training_batches(device, dataset, batch, workers):
    sampler = EpochSampler(dataset, 0)
    return make_loader(dataset, batch, sampler=sampler, num_workers=workers, pin_memory=device.type == "cuda")


def measure_loader(log, device, dataset, batch, workers):
    started = time.perf_counter()
    iterator = iter(training_batches(device, dataset, batch, workers))
    next(iterator)
    first = time.perf_counter() - started
    started, images = time.perf_counter(), 0
    for _, targets, *_ in iterator:
        images += len(targets)
        if time.perf_counter() - started > 2:
            break
    rate = images / (time.perf_counter() - started)
    log(f"loader alone, batch {batch}, {workers} workers", images_s=rate, first_batch_s=first)


def measure_epochs(log, device, dataset, batch, workers):
    engine = new_engine(device, torch.bfloat16, dropout=0.3)
    batches = training_batches(device, dataset, batch, workers)
    for epoch in range(2):
        batches.batch_sampler.sampler.set_epoch(epoch)
        row = engine.train_one_epoch(batches, RunningMetrics(epoch, device))
    name = f"an epoch from the cache, augmented on the device, batch {batch}, {workers} workers"
    log(name, images_s=row["images_per_second"], input_wait=row["input_wait"])


# ----------------------------------------------------------------------------------------------- compile and compiled


def part_compile(log, device, tiny):
    """torch.compile: the same loss and outputs, also of the averaged model; one graph for each of them."""
    torch.backends.cudnn.deterministic = True
    batch, side = (4, 32) if tiny else (256, 224)
    engine = new_engine(device, torch.bfloat16, ema=0.9, compiled_batch=batch)
    images, targets = (tensor.to(device) for tensor in image_batch(batch, side))
    with torch.compiler.set_stance("force_eager"):
        eager = logits_and_loss(engine, images, targets)[1].item()
    torch._dynamo.utils.counters.clear()
    started = time.perf_counter()
    _, loss = logits_and_loss(engine, images, targets)
    loss.backward()
    loss = loss.item()
    seconds = time.perf_counter() - started
    log("compiled: the loss", abs(loss - eager) < 0.05 * abs(eager), loss=loss, eager=eager, compile_s=seconds)
    for _ in range(3):
        run_step(engine, (images, targets), RunningMetrics(0, device))

    loader = [(torch.cat([images] * 2), torch.cat([targets] * 2)), (images, targets)]  # a full batch and an odd one
    started = time.perf_counter()
    compiled = engine.evaluate(loader, "compiled")
    seconds = time.perf_counter() - started
    with torch.compiler.set_stance("force_eager"):
        outputs = engine.evaluate(loader, "eager")
    gap = float(np.abs(outputs.probabilities - compiled.probabilities).max())
    log("compiled: the averaged model is evaluated", gap < 0.05, largest=gap, compile_s=seconds)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    log("compiled: a graph for training and one for evaluation", graphs == 2, graphs=graphs)


def part_compiled(log, device, tiny):
    """How fast compiled steps and evaluations are."""
    torch.backends.cudnn.deterministic = True
    batch, side = (4, 32) if tiny else (256, 224)
    engine, metrics = new_engine(device, torch.bfloat16, ema=0.9, compiled_batch=batch), RunningMetrics(0, device)
    images, targets = (tensor.to(device) for tensor in image_batch(batch, side))
    started = time.perf_counter()
    for _ in range(4):
        run_step(engine, (images, targets), metrics)
    metrics.check(last=True)
    seconds = time.perf_counter() - started
    values = speed_values(
        batch, *timed(lambda: run_step(engine, (images, targets), metrics), 2 if tiny else 16, device)
    )
    ok = reaches(device, values["images_s"], "compiled")
    log(f"compiled, ema, batch {batch}", ok, **values, first_steps_s=seconds)

    loader = [(torch.cat([images] * 2), torch.cat([targets] * 2))] * (2 if tiny else 16)
    engine.evaluate(loader[:1], "compiled")
    started = time.perf_counter()
    engine.evaluate(loader, "compiled")
    log("compiled, evaluation", images_s=len(loader) * 2 * batch / (time.perf_counter() - started))


# ------------------------------------------------------------------------------------------------------------- ranks


def part_ranks(log, device, tiny):
    """Several processes: two of torchrun on this GPU, which gloo connects, and NCCL with a single one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        runs = Runs(Path(work), device)
        with log.guarded("two processes"):
            check_two_ranks(log, runs, device, tiny)
    with log.guarded("NCCL"):
        check_collectives(log, device, 32 if tiny else 64)


def check_two_ranks(log, runs, device, tiny):
    """main.py in two processes trains and evaluates as in one."""
    flags = ["--amp", "off", "--use_augmentation", "--num_workers", 0]
    rate = 1e-6  # small: Adam's first steps turn differences of rounding into differences of the learning rate
    status = runs.start("one", *flags, lr=rate)
    started = time.perf_counter()
    trained = runs.start_ranks(tiny, *flags, *runs.new_run_flags("two", rate))
    seconds = time.perf_counter() - started
    if (status, trained.returncode) != (0, 0):
        log("two processes train", False, status=(status, trained.returncode), stderr=trained.stderr[-400:])
        return
    rows = [load_checkpoint(runs.work / name / "last_model.pth")["history"] for name in ("one", "two")]
    gaps = {
        name: max(abs(a[name] - b[name]) / abs(a[name]) for a, b in zip(*rows, strict=True))
        for name in ("train_loss", "val_loss")
    }
    log("two processes train as one", max(gaps.values()) < 1e-3, **gaps, seconds=seconds)

    checkpoint = runs.work / "one" / "best_model.pth"
    flags = ["--eval_only", "--resume", checkpoint, "--run_dir", runs.work / "evaluated"]
    evaluated = runs.start_ranks(tiny, *flags)
    if evaluated.returncode:
        log("two processes evaluate", False, status=evaluated.returncode, stderr=evaluated.stderr[-400:])
        return
    tables = [read_rows(runs.work / name / "test_predictions.csv") for name in ("one", "evaluated")]
    gap = max(
        abs(float(a[name]) - float(b[name]))
        for a, b in zip(*tables, strict=True)
        for name in a
        if name.startswith("prob_")
    )
    ok = gap < 1e-4 and [row["path"] for row in tables[0]] == [row["path"] for row in tables[1]]
    log("two processes evaluate as one", ok, largest=gap)


def check_collectives(log, device, side):
    """DistributedDataParallel and the exchanges of run/ranks.py in a group of one process: NCCL on a GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
    ranks.launched_by_torchrun = lambda: True  # which is otherwise so with two processes or more
    ranks.run_together(lambda: check_group_of_one(log, device, side), None)


def check_group_of_one(log, device, side):
    torch.backends.cudnn.deterministic = True
    set_float32_precision(None)
    images, targets = (tensor.to(device) for tensor in image_batch(16, side))
    plain, shared = (new_engine(device) for _ in range(2))
    parallel.prepare(shared.model, device, sync_bn=device.type == "cuda")
    shared.model.dropout.total = len(images)
    shared.trained = parallel.average_gradients(shared.model)
    for engine in (plain, shared):
        logits_and_loss(engine, images, targets)[1].backward()
    error = relative_error(gradient_of(plain.model), gradient_of(shared.model))
    backend = torch.distributed.get_backend_config()
    log("gradients of DistributedDataParallel", error < 1e-5, error=error, backend=backend)

    tensor = torch.arange(4.0, device=device)
    ranks.share_tensors([tensor])
    exchanged = ranks.sum_over_ranks(tensor.clone()), ranks.gather("here"), ranks.from_first(lambda: 5, "counts")
    ok = torch.equal(exchanged[0], tensor) and exchanged[1:] == (["here"], 5)
    log("exchanges of a group of one", ok, backend=backend)
    if device.type == "cuda":
        metrics = RunningMetrics(0, device)
        for _ in range(2):
            run_step(shared, (images, targets), metrics)
        with no_host_sync(log, "DistributedDataParallel"):
            run_step(shared, (images, targets), metrics)
    return 0


# -------------------------------------------------------------------------------------------------------------- auto


def part_auto(log, device, tiny):
    """--batch_size auto: the largest batch that fits, and a smaller one where there is less memory."""
    torch.backends.cudnn.deterministic = True
    limit, criterion = 16 if tiny else 1024, build_loss("cb", SAMPLES_PER_CLS)
    flags = ["--data_dirs", ".", "--no-pretrained", "--batch_size", "auto", "--image_size", 32 if tiny else 224]
    args = parse_flags(list(map(str, flags)))
    batch_search.largest_batch(args, device, criterion, NUM_CLASSES, batch_search.SMALLEST)  # leaves cuBLAS's workspace
    state = random_state(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    started = time.perf_counter()
    largest = batch_search.largest_batch(args, device, criterion, NUM_CLASSES, limit)
    seconds = time.perf_counter() - started
    kept = all(map(torch.equal, [state["cpu"], *state["cuda"]], [(now := random_state(device))["cpu"], *now["cuda"]]))
    left = (torch.cuda.memory_allocated() - before) / 2**20 if device.type == "cuda" else 0
    log("--batch_size auto", kept and left < 1, largest=largest, seconds=seconds, mib_left=left, random_state_kept=kept)
    if device.type != "cuda":
        return
    torch.cuda.set_per_process_memory_fraction(0.1)
    small = batch_search.largest_batch(args, device, criterion, NUM_CLASSES, limit)
    torch.cuda.set_per_process_memory_fraction(1.0)
    log("--batch_size auto with a tenth of the memory", small < largest, largest=small)


# -------------------------------------------------------------------------------------------------------------- save


def part_save(log, device, tiny):
    """How long a save stops the training, and how fast the training is while a thread writes."""
    torch.backends.cudnn.deterministic = True
    batch, side = (4, 32) if tiny else (256, 224)
    engine, metrics = new_engine(device, torch.bfloat16, dropout=0.3), RunningMetrics(0, device)
    images = tuple(tensor.to(device) for tensor in image_batch(batch, side))

    def step():
        run_step(engine, images, metrics)
        metrics.check(last=True)  # waits for the GPU: the clock of the host is read after each step

    def is_writing():
        return any(thread.name == CALL for thread in threading.enumerate())

    for _ in range(4):
        step()
    quiet, _ = timed(step, 2 if tiny else 8, device, 1)
    counts = np.array(SAMPLES_PER_CLS)
    targets = np.repeat(np.arange(NUM_CLASSES), counts)
    paths = Paths(f"/data/{target}/{i}.jpg" for i, target in enumerate(targets))
    index = ImageIndex(paths, targets, [str(c) for c in range(NUM_CLASSES)])
    args, splits = parse_flags(["--data_dirs", ".", "--no-pretrained"]), dict.fromkeys(("train", "val", "test"), index)
    with tempfile.TemporaryDirectory() as folder, Signals() as signals, signals.deferred():
        take_snapshot = functools.partial(snapshot, engine, Progress(), args, splits, counts, None)
        saver = Saver(folder, take_snapshot, signals)
        stopped, busy = [], []
        for _ in range(2):
            started = time.perf_counter()
            saver.after_epoch(True)
            stopped.append(time.perf_counter() - started)
            deadline = time.perf_counter() + 3
            while is_writing() and time.perf_counter() < deadline:
                started = time.perf_counter()
                step()
                busy.append(time.perf_counter() - started)
            saver.finish()
        files = [Path(folder, name) for name in (LAST, BEST)]
        values = {"mb": files[0].stat().st_size / 1e6, "seconds_stopped": min(stopped), "ms_per_step": 1e3 * quiet}
        if busy:
            values |= {"ms_per_step_while_writing": 1e3 * statistics.median(busy), "steps_while_writing": len(busy)}
        is_whole = [load_checkpoint(file)["epoch"] for file in files] == [-1, -1]
        log("a save stops the training for less than 0.3 s", is_whole and (tiny or min(stopped) < 0.3), **values)


# ------------------------------------------------------------------------------------------------------------- bench


def part_bench(log, device, tiny):
    """The command that users run, for the step and the epoch; with several GPUs, for one training on all of them."""
    with tempfile.TemporaryDirectory() as folder:
        output, program = Path(folder, "bench.json"), ROOT / ("tests/tools/small_bench.py" if tiny else "bench.py")
        flags = ["--device", device, "--parts", "step", "epoch", "--output", output]
        if torch.cuda.device_count() > 1:
            flags += ["--scaling", 1, torch.cuda.device_count()]
        command = [sys.executable, program, *flags]
        with open(Path(folder, "errors"), "w+") as errors:
            process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True)
            for line in process.stdout:  # at once: the part may be killed at its limit
                log("bench.py", line=line.rstrip())
            status = process.wait()
            errors.seek(0)
            log("bench.py", status == 0, status=status, stderr=errors.read()[-300:])
        results = json.loads(output.read_text())
    for size, rates in results["step"]["batches"].items():
        if rates:
            rate = rates["images_per_second"]
            ok = reaches(device, rate, "training") if size == "256" else None
            log(f"bench.py, step, batch {size}", ok, images_s=rate, reference=rates["reference_images_per_second"])
    epoch, wait = results["epoch"], results["epoch"]["input_wait"]
    is_gpu = device.type == "cuda"
    log("bench.py, epoch", wait < 0.01 if is_gpu else None, images_s=epoch["training"], input_wait=wait)
    ok = reaches(device, epoch["evaluation"], "evaluation")
    log("bench.py, evaluation", ok, images_s=epoch["evaluation"])


# ----------------------------------------------------------------------------------------------------------- command


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gpu_check", metavar="DIR", help="results are saved here [gpu_check]")
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    parser.add_argument("--tiny", action="store_true", help="small sizes and a thin network, for a dry run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="[all]")
    parser.add_argument("--limit", type=float, default=340, help="seconds for all parts together on a GPU [340]")
    return parser


def run_part(part, args, results):
    """Never returns: torch would wait 5 s at the exit for each worker that is still there."""
    os.setpgid(0, 0)  # what it starts is killed with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.tiny:
        resnet_custom.resnet50 = thin_resnet50
    log = Log(results, part)
    with log.guarded(part):
        globals()[f"part_{part}"](log, torch.device(args.device), args.tiny)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_phase(limits, args, results):
    """Run parts side by side. limits: {part: time limit in seconds}. -> exit statuses, None if killed at the limit"""
    started, fork = time.perf_counter(), multiprocessing.get_context("fork")
    processes = {part: fork.Process(target=run_part, args=(part, args, results)) for part in limits}
    for process in processes.values():
        process.start()
    statuses = []
    try:
        for part, process in processes.items():
            process.join(max(0, limits[part] - (time.perf_counter() - started)))
            statuses.append(process.exitcode)
            print(f"---- {part}: {time.perf_counter() - started:.0f} s, status {statuses[-1]}", flush=True)
    finally:
        for process in processes.values():
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                process.join()
    return statuses


def main(argv=None):
    """-> exit status: 0 if every check passed and every part finished, else 1"""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # parts are in process groups of their own: kill them too
    Path(args.out).mkdir(parents=True, exist_ok=True)
    results = Path(args.out, "gpu_check.jsonl")
    results.unlink(missing_ok=True)
    started, statuses, is_gpu = time.perf_counter(), [], args.device.startswith("cuda")
    for phase in PHASES:
        seconds_left = args.limit - (time.perf_counter() - started)
        limits = {part: limit for part, limit in phase.items() if part in args.parts}
        if is_gpu and limits and seconds_left < 15:
            print(f"skipped for lack of time: {', '.join(limits)}")
            statuses.append(None)
        elif limits:
            limits = {part: min(seconds_left, limit) if is_gpu else 600 for part, limit in limits.items()}
            statuses += run_phase(limits, args, results)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    failed = [row for row in rows if row["ok"] is False]
    print(f"==== {sum(row['ok'] is True for row in rows)} checks passed, {len(failed)} failed")
    for row in failed:
        print("FAIL", described({name: value for name, value in row.items() if name != "ok"}))
    for row in (row for row in rows if "images_s" in row):
        names = ("mfu_of_989", "ms_host", "input_wait", "gib", "reference")
        more = described({name: row[name] for name in names if name in row})
        print(f"| {row['part']} | {row['name']} | {row['images_s']:.0f} images/s | {more} |")
    return 1 if failed or any(status != 0 for status in statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
