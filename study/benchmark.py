"""The measurements of `bench.py`: speed of input, training step, evaluation and start, and memory."""

import math
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
import torchvision
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode

from dataset_double import AugmentedSkinDataset, DoubleSkinDataset, EpochSampler, make_loader, train_loader
from engine import Engine, RunningMetrics
from flag_checks import parse_flags
from images.cache import ImageCache, read_all
from images.demo import draw_patch
from images.device_batches import DeviceBatches
from images.folders import ImageIndex, Paths, index_folders
from images.leakage import near_duplicates
from images.splits import make_splits
from metrics import RESAMPLES, full_metrics
from model import Model
from run.cli import progress_bar
from run.cores import num_cores
from run.files import write_json
from run.machine import has_fused_optimizer, memory_format, resolve_amp
from study.benchmark_prediction import prediction_rates
from study.benchmark_reference import (
    reference_input_rate,
    reference_process,
    reference_resample,
    reference_step_rate,
    wait_for_device,
)
from study.benchmark_sharing import measure_sharing
from utils import CBLoss

IMAGE_SIZE, BATCH_SIZE = 224, 32
SAMPLES_PER_CLS = (1000, 500, 200, 100, 50, 30, 20)
NUM_CLASSES = len(SAMPLES_PER_CLS)
PHOTO_SIDES = (224, 1024)  # in pixels, of the photographs that are read
NUM_PHOTOS, ROUNDS = 128, 3
CPU_STEPS, GPU_STEPS = 2, 30  # timed training steps per round
STARTUP_FILES = (10_000, 100_000)
NUM_PREDICTIONS, NUM_DUPLICATE_IMAGES = 100_000, 10_000
INDEX_SIZE = 1_000_000
MATRIX_SIZE = 4096


def measure_parts(parts: Iterable[str], device: torch.device, compile: bool, output: str | Path) -> dict:
    """Measure the parts that `--parts` names. -> content of bench.json, which is written after each part."""
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # as main.py does
    results = {"machine": describe_machine(device)}
    write_json(output, results)  # first: a file that cannot be written is reported before minutes of measuring
    measurements = {
        # memory comes first, as it would include what the others leave in the process
        "memory": ("memory_mb", lambda: measure_memory(device)),
        "input": ("input", lambda: measure_input(device)),
        "step": ("step", lambda: measure_step(device, compile)),
        "sharing": ("sharing", lambda: measure_sharing(device, SAMPLES_PER_CLS, median_rates)),
        "evaluation": ("evaluation", measure_evaluation),
        "predict": ("predict", lambda: measure_predict(device)),
        "startup": ("startup", lambda: measure_startup(device)),
    }
    for part in sorted(set(parts), key=list(measurements).index):
        print(f"measuring {part} ...", flush=True)
        key, measure = measurements[part]
        results[key] = measure()
        write_json(output, results)
    return results


def describe_machine(device: torch.device) -> dict:
    """What the results depend on: hardware, versions and the date."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(": ")[1] if models else cpu
    return {
        "cpu": cpu,
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "date": date.today().isoformat(),
    }


def median_rates(measurements: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of several rounds. The measurements take turns, so that a change in the machine's speed affects all."""
    rates = {name: [] for name in measurements}
    for _ in range(ROUNDS):
        for name, measure in measurements.items():
            rates[name].append(measure())
    return {name: statistics.median(values) for name, values in rates.items()}


# ------------------------------------------------------------------------------------------------------------- input


def measure_input(device: torch.device) -> dict[str, dict[str, float]]:
    """Images per second of one CPU core. -> {side of the photographs: {"reference", "cold", "warm"}}

    reference and warm: from files or cache to normalized batches on the device, every image augmented; cold: from
    files into the cache.
    """
    with one_core():
        return {str(side): _input_rates(side, device) for side in PHOTO_SIDES}


@contextmanager
def one_core() -> Iterator[None]:
    """A context in which torch, and everything that asks `num_cores`, computes in one thread."""
    threads, max_cores = torch.get_num_threads(), os.environ.get("LOKY_MAX_CPU_COUNT")
    torch.set_num_threads(1)
    os.environ["LOKY_MAX_CPU_COUNT"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ["LOKY_MAX_CPU_COUNT"]
        if max_cores is not None:
            os.environ["LOKY_MAX_CPU_COUNT"] = max_cores


def _input_rates(side, device):
    with tempfile.TemporaryDirectory() as folder, reference_process() as process:
        photos, model = Path(folder, "photos"), Model(2).to(device)
        write_photos(photos, side)
        originals = DoubleSkinDataset(read_into_cache(photos, Path(folder, "cache")), IMAGE_SIZE)
        augmented = AugmentedSkinDataset(originals, 10 * NUM_PHOTOS, on_device=device.type == "cuda")
        copies = Subset(augmented, range(NUM_PHOTOS, len(augmented)))
        loader = make_loader(copies, BATCH_SIZE, sampler=EpochSampler(copies, seed=0))

        def reference():
            return process.submit(reference_input_rate, photos, device, BATCH_SIZE, IMAGE_SIZE).result()

        def cold():
            started = time.perf_counter()
            read_into_cache(photos, Path(folder, f"cache_{time.monotonic_ns()}"))
            return NUM_PHOTOS / (time.perf_counter() - started)

        def warm():
            started = time.perf_counter()
            for images, _ in DeviceBatches(loader, device):
                model.normalize(images)
            wait_for_device(device)
            return len(copies) / (time.perf_counter() - started)

        reference(), warm()
        return median_rates({"reference": reference, "cold": cold, "warm": warm})


def write_photos(folder: Path, side: int) -> None:
    """Write `NUM_PHOTOS` different JPEGs of skin, `side` pixels wide and high, into two class folders."""
    for number in range(NUM_PHOTOS):
        rng = np.random.default_rng(number)
        class_folder = folder / str(number % 2)
        class_folder.mkdir(exist_ok=True, parents=True)
        patch = cv2.resize(draw_patch(number % 5, rng), (side, side), interpolation=cv2.INTER_CUBIC)
        grainy = np.clip(patch + rng.normal(0, 2, patch.shape), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(grainy).save(class_folder / f"{number}.jpg", quality=90)


def read_into_cache(photos: Path, cache_dir: Path) -> ImageIndex:
    """Index class folders and decode every image into a new cache."""
    index = index_folders([photos])
    return read_all({"data": index}, ImageCache(cache_dir, IMAGE_SIZE), skip_broken=False)["data"]


# -------------------------------------------------------------------------------------------------------------- step


def measure_step(device: torch.device, compile: bool) -> dict:
    """Training steps on images that are on the device already: forward, backward, optimizer."""
    steps = GPU_STEPS if device.type == "cuda" else CPU_STEPS
    amp_dtype = resolve_amp("auto", device)
    compiled_batch = BATCH_SIZE if compile else 0
    engine = Engine(
        Model(NUM_CLASSES), CBLoss(SAMPLES_PER_CLS), device, amp_dtype, clip_grad=1.0, compiled_batch=compiled_batch
    )
    engine.optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-4, fused=has_fused_optimizer(device))
    engine.scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer)
    images = torch.randint(0, 256, (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=memory_format(device))
    targets = torch.arange(BATCH_SIZE, device=device) % NUM_CLASSES

    def train(steps):
        return engine.train_one_epoch([(images, targets)] * steps, RunningMetrics(0, device))["images_per_second"]

    def ours():
        train(1)  # not timed, as in the reference
        return train(steps)

    with reference_process() as process:

        def reference():
            sizes = BATCH_SIZE, IMAGE_SIZE
            return process.submit(reference_step_rate, device, SAMPLES_PER_CLS, *sizes, steps).result()

        reference(), ours()
        rates = median_rates({"reference_images_per_second": reference, "images_per_second": ours})
    peak = matrix_peak(amp_dtype or torch.float32, device)
    gflop = gflop_per_image()
    return {
        **rates,
        "precision": str(amp_dtype or torch.float32).removeprefix("torch."),
        "gflop_per_image": gflop,
        "peak_gflops": peak,
        "share_of_peak": rates["images_per_second"] * gflop / peak,
        "reference_share_of_peak": rates["reference_images_per_second"] * gflop / peak,
    }


def gflop_per_image() -> float:
    """GFLOP of the forward and backward pass; a multiplication and an addition are two operations."""
    with torch.device("meta"):
        model, image = Model(NUM_CLASSES), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return counter.get_total_flops() / 1e9


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a product of two large square matrices, the best of five."""
    n = MATRIX_SIZE
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        wait_for_device(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds[1:]) / 1e9


# -------------------------------------------------------------------------------------------------------- evaluation


def measure_evaluation() -> dict:
    """Bootstrap resamples per second, with all metrics of each; seconds to find near-duplicate photographs."""
    rng = np.random.default_rng(0)
    shares = np.array(SAMPLES_PER_CLS) / sum(SAMPLES_PER_CLS)
    targets = np.repeat(np.arange(NUM_CLASSES), np.maximum(2, (shares * NUM_PREDICTIONS).astype(int)))
    scores = rng.normal(size=(len(targets), NUM_CLASSES)) + 2 * np.eye(NUM_CLASSES)[targets]
    probabilities = torch.softmax(torch.from_numpy(scores), dim=1).float().numpy()

    def reference():
        started = time.perf_counter()
        reference_resample(targets, probabilities, rng)
        return 1 / (time.perf_counter() - started)

    def ours():
        started = time.perf_counter()
        full_metrics(targets, probabilities, [str(c) for c in range(NUM_CLASSES)], SAMPLES_PER_CLS)
        return RESAMPLES / (time.perf_counter() - started)

    rates = median_rates({"reference": reference, "ours": ours})
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    noise = rng.integers(256, size=NUM_DUPLICATE_IMAGES * 1000 + math.prod(shape), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(noise, math.prod(shape))[::1000]  # each a different image
    pixels = windows[:NUM_DUPLICATE_IMAGES].reshape(-1, *shape)
    started = time.perf_counter()
    near_duplicates(pixels, np.arange(NUM_DUPLICATE_IMAGES), np.arange(NUM_DUPLICATE_IMAGES) % 3)
    return {"resamples_per_second": rates, "near_duplicates_s": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------------------- predict


def measure_predict(device: torch.device) -> dict[str, dict[str, float]]:
    """Images per second by predict.py from files, and by an evaluation. -> {side of the photographs: rates}"""
    functions = write_photos, read_into_cache, median_rates
    return {str(side): prediction_rates(device, *functions, side, IMAGE_SIZE, BATCH_SIZE) for side in PHOTO_SIDES}


# ----------------------------------------------------------------------------------------------------------- startup


def measure_startup(device: torch.device) -> dict[str, dict[str, float]]:
    """-> {number of files: {"first_s", "second_s"}}; the second start finds the images in the cache."""
    return {str(count): _startup_seconds(count, device) for count in STARTUP_FILES}


def _startup_seconds(count, device):
    """Seconds from class folders to the first batch, at 32 px: index, check, cache, split, loader.

    The rest of the time to the first step does not depend on the number of files.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_many_files(Path(folder, "photos"), count)
        flags = ["--data_dirs", f"{folder}/photos", "--cache_dir", f"{folder}/cache", "--image_size", "32"]
        args = parse_flags([*flags, "--no-pretrained", "--use_augmentation"])

        def start():
            started = time.perf_counter()
            splits = make_splits(args)
            loader = train_loader(splits["train"], args, device, use_augmentation=True, sampling=args.sampling)
            next(iter(loader))
            return time.perf_counter() - started

        return {"first_s": start(), "second_s": start()}


def write_many_files(folder: Path, count: int) -> None:
    """Write `count` different small photographs, spread over class folders."""
    for c in range(NUM_CLASSES):
        (folder / str(c)).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in progress_bar(range(count), "files", "file"):
        photo = cv2.resize(rng.integers(256, size=(8, 8, 3), dtype=np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
        path = folder / str(number % NUM_CLASSES) / f"photo{number:06d}.jpg"
        path.write_bytes(cv2.imencode(".jpg", photo)[1])


# ------------------------------------------------------------------------------------------------------------ memory


def measure_memory(device: torch.device) -> dict[str, float]:
    """MB of the training process, and what each loader worker adds to it, with an index of a million images.

    For a worker only the memory counts that it shares with no other process: the rest is in the process already.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder, "photos"), IMAGE_SIZE)
        cached = read_into_cache(Path(folder, "photos"), Path(folder, "cache"))
        paths = Paths(f"/data/forehead_wrinkles/{i % NUM_CLASSES}/subject_{i:07d}_left.jpg" for i in range(INDEX_SIZE))
        targets = np.arange(INDEX_SIZE) % NUM_CLASSES
        rows = np.resize(cached.cache_rows, INDEX_SIZE).astype(np.int64)
        index = ImageIndex(paths, targets, [str(c) for c in range(NUM_CLASSES)], rows, cached.cache)
        dataset = AugmentedSkinDataset(DoubleSkinDataset(index, IMAGE_SIZE), on_device=device.type == "cuda")
        before = children_of(os.getpid())
        batches = iter(make_loader(dataset, BATCH_SIZE, sampler=EpochSampler(dataset, seed=0), num_workers=2))
        for _ in range(100):
            next(batches)
        workers = children_of(os.getpid()) - before
        private = [private_megabytes(pid) for pid in workers]
        return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "per_worker": max(private)}


def children_of(pid: int) -> set[str]:
    """-> process ids of the child processes."""
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def private_megabytes(pid: str) -> float:
    """MB of memory that a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


# ------------------------------------------------------------------------------------------------------------- table


def format_table(results: dict) -> str:
    """The content of bench.json as a Markdown table."""
    rows = [("", "reference", "ours", "ratio"), ("---",) * 4]
    for side, rates in results.get("input", {}).items():
        for name in ("cold", "warm"):
            reference, ours = rates["reference"], rates[name]
            title = f"input, {side} px, {name}, images/s per core"
            rows.append((title, f"{reference:.0f}", f"{ours:.0f}", f"{ours / reference:.1f}x"))
    if step := results.get("step"):
        reference, ours = step["reference_images_per_second"], step["images_per_second"]
        title = f"training step, images/s ({step['precision']})"
        rows.append((title, f"{reference:.2f}", f"{ours:.2f}", f"{ours / reference:.2f}x"))
        shares = f"{step['reference_share_of_peak']:.0%}", f"{step['share_of_peak']:.0%}"
        rows.append((f"share of the matrix peak, {step['peak_gflops']:.0f} GFLOP/s", *shares, ""))
    if sharing := results.get("sharing"):
        alone, together = sharing["alone"], sharing["together"]
        title = "two trainings at once (reference: one alone), 64 px, images/s"
        rows.append((title, f"{alone:.1f}", f"{together:.1f}", f"{together / alone:.2f}x"))
    if evaluation := results.get("evaluation"):
        reference, ours = (evaluation["resamples_per_second"][name] for name in ("reference", "ours"))
        title = f"bootstrap of {NUM_PREDICTIONS:,} predictions, resamples/s"
        rows.append((title, f"{reference:.2f}", f"{ours:.0f}", f"{ours / reference:.0f}x"))
        seconds = f"{evaluation['near_duplicates_s']:.1f}"
        rows.append((f"near-duplicates among {NUM_DUPLICATE_IMAGES:,} images, s", "", seconds, ""))
    for side, rates in results.get("predict", {}).items():
        cached, files = rates["cached"], rates["files"]
        title = f"predict.py from {side} px files (reference: evaluation from the cache), images/s"
        rows.append((title, f"{cached:.2f}", f"{files:.2f}", f"{files / cached:.2f}x"))
    for count, seconds in results.get("startup", {}).items():
        first, second = (f"{seconds[name]:.2f}" for name in ("first_s", "second_s"))
        rows.append((f"start with {count} files, first / second time, s", "", f"{first} / {second}", ""))
    for name, megabytes in results.get("memory_mb", {}).items():
        rows.append((f"memory with {INDEX_SIZE:,} images, MB: {name}", "", f"{megabytes:.0f}", ""))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
