"""The measurements of `bench.py`: speed of input, training step, evaluation and start, and memory."""

import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
import torchvision
from torch.utils.data import Subset

from dataset_double import AugmentedSkinDataset, DoubleSkinDataset, EpochSampler, make_loader, train_loader
from flag_checks import parse_flags
from images.device_batches import DeviceBatches
from images.folders import ImageIndex, Paths
from images.leakage import near_duplicates
from images.splits import make_splits
from metrics import RESAMPLES, full_metrics
from model import Model
from run.cli import progress_bar
from run.cores import num_cores
from run.files import write_json
from study import benchmark_common as common
from study.benchmark_prediction import prediction_rates
from study.benchmark_reference import reference_input_rate, reference_process, reference_resample, wait_for_device
from study.benchmark_scaling import check_scaling, measure_scaling
from study.benchmark_sharing import measure_sharing
from study.benchmark_step import measure_epoch, measure_step

PHOTO_SIDES = (224, 1024)  # in pixels, of the photographs that are read
STARTUP_FILES = (10_000, 100_000)
NUM_PREDICTIONS, NUM_DUPLICATE_IMAGES = 100_000, 10_000
INDEX_SIZE = 1_000_000


def measure_parts(
    parts: Iterable[str], device: torch.device, compile: bool, output: str | Path, scaling: Sequence[int] = ()
) -> dict:
    """Measure the parts that `--parts` names, then `--scaling`. -> content of bench.json, which is written after each.

    scaling: numbers of processes. Raises UserError if there are not as many GPUs or cores.
    """
    if scaling:
        check_scaling(scaling, device)
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))  # as main.py does
    results = {"machine": describe_machine(device)}
    write_json(output, results)  # first: a file that cannot be written is reported before minutes of measuring
    measurements = {
        # memory comes first, as it would include what the others leave in the process
        "memory": ("memory_mb", lambda: measure_memory(device)),
        "input": ("input", lambda: measure_input(device)),
        "step": ("step", lambda: measure_step(device, compile)),
        "epoch": ("epoch", lambda: measure_epoch(device, compile)),
        "sharing": ("sharing", lambda: measure_sharing(device)),
        "evaluation": ("evaluation", measure_evaluation),
        "predict": ("predict", lambda: measure_predict(device)),
        "startup": ("startup", lambda: measure_startup(device)),
        "scaling": ("scaling", lambda: measure_scaling(scaling, device)),
    }
    for part in sorted({*parts, *["scaling"] * bool(scaling)}, key=list(measurements).index):
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
        common.write_photos(photos, side)
        originals = DoubleSkinDataset(common.read_into_cache(photos, Path(folder, "cache")), common.IMAGE_SIZE)
        augmented = AugmentedSkinDataset(originals, 10 * common.NUM_PHOTOS, on_device=device.type == "cuda")
        copies = Subset(augmented, range(common.NUM_PHOTOS, len(augmented)))
        loader = make_loader(copies, common.BATCH_SIZE, sampler=EpochSampler(copies, seed=0))

        def reference():
            return process.submit(reference_input_rate, photos, device, common.BATCH_SIZE, common.IMAGE_SIZE).result()

        def cold():
            started = time.perf_counter()
            common.read_into_cache(photos, Path(folder, f"cache_{time.monotonic_ns()}"))
            return common.NUM_PHOTOS / (time.perf_counter() - started)

        def warm():
            started = time.perf_counter()
            for images, _ in DeviceBatches(loader, device):
                model.normalize(images)
            wait_for_device(device)
            return len(copies) / (time.perf_counter() - started)

        reference(), warm()
        return common.median_rates({"reference": reference, "cold": cold, "warm": warm})


# -------------------------------------------------------------------------------------------------------- evaluation


def measure_evaluation() -> dict:
    """Bootstrap resamples per second, with all metrics of each; seconds to find near-duplicate photographs."""
    rng = np.random.default_rng(0)
    shares = np.array(common.SAMPLES_PER_CLS) / sum(common.SAMPLES_PER_CLS)
    targets = np.repeat(np.arange(common.NUM_CLASSES), np.maximum(2, (shares * NUM_PREDICTIONS).astype(int)))
    scores = rng.normal(size=(len(targets), common.NUM_CLASSES)) + 2 * np.eye(common.NUM_CLASSES)[targets]
    probabilities = torch.softmax(torch.from_numpy(scores), dim=1).float().numpy()

    def reference():
        started = time.perf_counter()
        reference_resample(targets, probabilities, rng)
        return 1 / (time.perf_counter() - started)

    def ours():
        started = time.perf_counter()
        full_metrics(targets, probabilities, [str(c) for c in range(common.NUM_CLASSES)], common.SAMPLES_PER_CLS)
        return RESAMPLES / (time.perf_counter() - started)

    rates = common.median_rates({"reference": reference, "ours": ours})
    shape = (common.IMAGE_SIZE, common.IMAGE_SIZE, 3)
    noise = rng.integers(256, size=NUM_DUPLICATE_IMAGES * 1000 + math.prod(shape), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(noise, math.prod(shape))[::1000]  # each a different image
    pixels = windows[:NUM_DUPLICATE_IMAGES].reshape(-1, *shape)
    started = time.perf_counter()
    near_duplicates(pixels, np.arange(NUM_DUPLICATE_IMAGES), np.arange(NUM_DUPLICATE_IMAGES) % 3)
    return {"resamples_per_second": rates, "near_duplicates_s": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------------------- predict


def measure_predict(device: torch.device) -> dict[str, dict[str, float]]:
    """Images per second by predict.py from files, and by an evaluation. -> {side of the photographs: rates}"""
    return {str(side): prediction_rates(device, side) for side in PHOTO_SIDES}


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
    for c in range(common.NUM_CLASSES):
        (folder / str(c)).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in progress_bar(range(count), "files", "file"):
        photo = cv2.resize(rng.integers(256, size=(8, 8, 3), dtype=np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
        path = folder / str(number % common.NUM_CLASSES) / f"photo{number:06d}.jpg"
        path.write_bytes(cv2.imencode(".jpg", photo)[1])


# ------------------------------------------------------------------------------------------------------------ memory


def measure_memory(device: torch.device) -> dict[str, float]:
    """MB of the training process, and what each loader worker adds to it, with an index of a million images.

    For a worker only the memory counts that it shares with no other process: the rest is in the process already.
    """
    import resource  # which Windows lacks

    with tempfile.TemporaryDirectory() as folder:
        common.write_photos(Path(folder, "photos"), common.IMAGE_SIZE)
        cached = common.read_into_cache(Path(folder, "photos"), Path(folder, "cache"))
        paths = Paths(
            f"/data/forehead_wrinkles/{i % common.NUM_CLASSES}/subject_{i:07d}_left.jpg" for i in range(INDEX_SIZE)
        )
        targets = np.arange(INDEX_SIZE) % common.NUM_CLASSES
        rows = np.resize(cached.cache_rows, INDEX_SIZE).astype(np.int64)
        index = ImageIndex(paths, targets, [str(c) for c in range(common.NUM_CLASSES)], rows, cached.cache)
        dataset = AugmentedSkinDataset(DoubleSkinDataset(index, common.IMAGE_SIZE), on_device=device.type == "cuda")
        before = children_of(os.getpid())
        batches = iter(make_loader(dataset, common.BATCH_SIZE, sampler=EpochSampler(dataset, seed=0), num_workers=2))
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
