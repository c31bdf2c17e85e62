#!/usr/bin/env python3
"""Measure speed against the usual recipe of this task, side by side in one run.

python bench.py                     everything: a table, and bench.json
python bench.py --parts input step  some of input, step, evaluation, startup, memory
"""

import argparse
import functools
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import cv2
import joblib
import numpy as np
import PIL
import torch
import torchvision
from sklearn import metrics as sk_metrics
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import main
from dataset_double import (
    AugmentedSkinDataset,
    DoubleSkinDataset,
    EpochSampler,
    ImageIndex,
    index_folders,
    make_loader,
    read_all,
)
from demo import draw_patch
from engine import DeviceBatches, Engine, RunningFigures, keep_freed_memory, resolve_amp
from files import UserError, progress_bar, write_json
from flags import parse_args
from image_cache import ImageCache, Paths
from leaks import near_duplicates
from metrics import RESAMPLES, full_metrics
from model import IMAGENET_MEAN, IMAGENET_STD, Model
from utils import CBLoss

IMAGE_SIZE, BATCH_SIZE = 224, 32
SAMPLES_PER_CLS = (1000, 500, 200, 100, 50, 30, 20)
CLASSES = len(SAMPLES_PER_CLS)
SOURCE_SIDES = (224, 1024)  # pixels of the photographs that are read
PHOTOS, ROUNDS = 128, 3
STARTUP_FILES = (10_000, 100_000)
PREDICTIONS, DUPLICATE_IMAGES = 100_000, 10_000
INDEX_SIZE = 1_000_000
MATRIX_SIZE = 4096


def usual_process():
    """Where the usual recipe runs: nothing that this project sets in its own process helps or hinders it there."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def median_of_rounds(measures):
    """Take turns, so that a change in the machine's speed meets all. measures: {name: function -> rate}."""
    rates = {name: [] for name in measures}
    for _ in range(ROUNDS):
        for name, measure in measures.items():
            rates[name].append(measure())
    return {name: statistics.median(values) for name, values in rates.items()}


# ----------------------------------------------------------------------------------------------------------- input


def write_photos(folder, side):
    """`PHOTOS` different JPEGs of skin in two class folders."""
    for number in range(PHOTOS):
        rng = np.random.default_rng(number)
        place = Path(folder, str(number % 2))
        place.mkdir(exist_ok=True, parents=True)
        patch = cv2.resize(draw_patch(number % 5, rng), (side, side), interpolation=cv2.INTER_CUBIC)
        grain = np.clip(patch + rng.normal(0, 2, patch.shape), 0, 255).astype(np.uint8)
        PIL.Image.fromarray(grain).save(place / f"{number}.jpg", quality=90)


def reference_input_rate(folder, device):
    """torchvision's ImageFolder: open, decode whole, augment at full size, resize, to tensor, normalise."""
    torch.set_num_threads(1)
    transform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(15, translate=(0.05, 0.05), scale=(1 / 1.1, 1.1)),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            v2.Resize((IMAGE_SIZE, IMAGE_SIZE)),
            torchvision.transforms.ToTensor(),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    photos = torchvision.datasets.ImageFolder(folder, transform)
    started = time.perf_counter()
    for images, _ in DataLoader(photos, BATCH_SIZE, shuffle=True):
        images.to(device)
    synchronise(device)
    return PHOTOS / (time.perf_counter() - started)


def measure_input(device):
    """Images a second of one core of the CPU.

    reference and warm: to a normalised batch on the device, all images augmented; cold: into the cache.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # the cache then decodes in one thread
    try:
        return {str(side): _input_rates(side, device) for side in SOURCE_SIDES}
    finally:
        torch.set_num_threads(threads)
        del os.environ["LOKY_MAX_CPU_COUNT"]


def _input_rates(side, device):
    with tempfile.TemporaryDirectory() as folder, usual_process() as process:
        photos, model = Path(folder, "photos"), Model(2).to(device)
        write_photos(photos, side)
        originals = DoubleSkinDataset(read_into_cache(photos, Path(folder, "cache")), IMAGE_SIZE)
        augmented = AugmentedSkinDataset(originals, 10 * PHOTOS, on_device=device.type == "cuda")
        copies = Subset(augmented, range(PHOTOS, len(augmented)))
        loader = make_loader(copies, BATCH_SIZE, sampler=EpochSampler(copies, seed=0))

        def reference():
            return process.submit(reference_input_rate, photos, device).result()

        def cold():
            started = time.perf_counter()
            read_into_cache(photos, Path(folder, f"cache_{time.monotonic_ns()}"))
            return PHOTOS / (time.perf_counter() - started)

        def warm():
            started = time.perf_counter()
            for images, _ in DeviceBatches(loader, device):
                model.normalise(images)
            synchronise(device)
            return len(copies) / (time.perf_counter() - started)

        reference(), warm()
        return median_of_rounds({"reference": reference, "cold": cold, "warm": warm})


def read_into_cache(photos, folder):
    index = index_folders([photos])
    return read_all({"data": index}, ImageCache(folder, IMAGE_SIZE), skip_broken=False)["data"]


# ------------------------------------------------------------------------------------------------------------ step


def batch_on(device):
    images = torch.randint(0, 256, (BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    return images, torch.arange(BATCH_SIZE, device=device) % CLASSES


def steps_to_time(device):
    return 30 if device.type == "cuda" else 1


@functools.cache
def _reference_trainer(device):
    model = Model(CLASSES).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), *batch_on(device)


def reference_step_rate(device):
    """Float32, contiguous memory, AdamW as it comes."""
    model, optimizer, images, targets = _reference_trainer(device)
    started = time.perf_counter()
    for _ in range(steps_to_time(device)):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
    synchronise(device)
    return steps_to_time(device) * BATCH_SIZE / (time.perf_counter() - started)


def measure_step(device, compile):
    """Training steps, forward and backward and optimizer, on images that are on the device already."""
    amp_dtype = resolve_amp("auto", device)
    engine = Engine(Model(CLASSES), CBLoss(SAMPLES_PER_CLS), device, amp_dtype, clip_grad=1.0, compile=compile)
    engine.optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-4, fused=True)
    engine.scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer)
    images, targets = batch_on(device)
    batches = [(images.contiguous(memory_format=torch.channels_last), targets)] * steps_to_time(device)

    def ours():
        return engine.train_one_epoch(batches, RunningFigures(0, engine.device))["images_per_second"]

    with usual_process() as process:

        def reference():
            return process.submit(reference_step_rate, device).result()

        for warm_up in (reference, ours, ours):
            warm_up()
        rates = median_of_rounds({"reference_images_per_second": reference, "images_per_second": ours})
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


def gflop_per_image():
    """Forward and backward, a multiplication and an addition being two operations."""
    with torch.device("meta"):
        model, image = Model(CLASSES), torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return counter.get_total_flops() / 1e9


def matrix_peak(dtype, device):
    """GFLOP/s of the best of five products of two square matrices."""
    n = MATRIX_SIZE
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds[1:]) / 1e9


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------------- startup


def measure_startup(device):
    return {str(count): _startup(count, device) for count in STARTUP_FILES}


def _startup(count, device):
    """Seconds from class folders to the first batch: index, check, cache, split, loader. 32 px, the second with cache.

    What is left to the first step does not depend on the number of files.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_many_files(Path(folder, "photos"), count)
        flags = ["--data_dirs", f"{folder}/photos", "--cache_dir", f"{folder}/cache", "--image_size", "32"]
        args, _ = parse_args([*flags, "--no-pretrained", "--use_augmentation"], folder)

        def start():
            started = time.perf_counter()
            parts = main.split_data(args)
            loader = main.train_loader_for(args, parts["train"], device)
            next(iter(loader))
            return time.perf_counter() - started

        return {"first_s": start(), "second_s": start()}


def write_many_files(folder, count):
    photo = PIL.Image.fromarray(draw_patch(3, np.random.default_rng(0), 64))
    folder.mkdir()
    photo.save(folder / "photo.jpg")
    content = (folder / "photo.jpg").read_bytes()
    (folder / "photo.jpg").unlink()
    for c in range(CLASSES):
        (folder / str(c)).mkdir()
    for number in progress_bar(range(count), "files", "file"):
        (folder / str(number % CLASSES) / f"person_{number // 10:06d}_{number % 10}.jpg").write_bytes(content)


# ------------------------------------------------------------------------------------------------------ evaluation


def reference_figures(targets, probabilities, rng):
    """One stratified resample, and its figures by scikit-learn."""
    members = [np.flatnonzero(targets == c) for c in range(CLASSES)]
    drawn = np.concatenate([rng.choice(of_class, len(of_class)) for of_class in members])
    targets, probabilities = targets[drawn], probabilities[drawn]
    predictions = probabilities.argmax(axis=1)
    sk_metrics.precision_recall_fscore_support(targets, predictions, zero_division=0)
    for c in range(CLASSES):
        sk_metrics.roc_auc_score(targets == c, probabilities[:, c])
        sk_metrics.average_precision_score(targets == c, probabilities[:, c])


def measure_evaluation():
    """Bootstrap resamples a second, with all figures of each; seconds to look for near-duplicate photographs."""
    rng = np.random.default_rng(0)
    shares = np.array(SAMPLES_PER_CLS) / sum(SAMPLES_PER_CLS)
    targets = np.repeat(np.arange(CLASSES), np.maximum(2, (shares * PREDICTIONS).astype(int)))
    scores = rng.normal(size=(len(targets), CLASSES)) + 2 * np.eye(CLASSES)[targets]
    probabilities = torch.softmax(torch.from_numpy(scores), dim=1).float().numpy()

    def rate(resamples, compute):
        started = time.perf_counter()
        compute()
        return resamples / (time.perf_counter() - started)

    rates = median_of_rounds(
        {
            "reference": lambda: rate(1, lambda: reference_figures(targets, probabilities, rng)),
            "ours": lambda: rate(
                RESAMPLES, lambda: full_metrics(targets, probabilities, range(CLASSES), SAMPLES_PER_CLS)
            ),
        }
    )
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    noise = rng.integers(256, size=DUPLICATE_IMAGES * 1000 + math.prod(shape), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(noise, math.prod(shape))[::1000]  # each image another
    pixels = windows[:DUPLICATE_IMAGES].reshape(-1, *shape)
    started = time.perf_counter()
    near_duplicates(pixels, np.arange(DUPLICATE_IMAGES), np.arange(DUPLICATE_IMAGES) % 3)
    return {"resamples_per_second": rates, "near_duplicates_s": time.perf_counter() - started}


# ---------------------------------------------------------------------------------------------------------- memory


def measure_memory(device):
    """MB of the process that trains and what each worker adds to it, with an index of a million images at 224 px.

    A worker adds what it shares with nobody; what it has in common with the process and the cache is there once.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder, "photos"), IMAGE_SIZE)
        cached = read_into_cache(Path(folder, "photos"), Path(folder, "cache"))
        paths = Paths(f"/data/forehead_wrinkles/{i % CLASSES}/person_{i:07d}_left.jpg" for i in range(INDEX_SIZE))
        targets = np.arange(INDEX_SIZE) % CLASSES
        million = ImageIndex(
            paths, targets, list("0123456"), np.resize(cached.rows, INDEX_SIZE).astype(np.int64), cached.cache
        )
        dataset = AugmentedSkinDataset(DoubleSkinDataset(million, IMAGE_SIZE), on_device=device.type == "cuda")
        before = children_of(os.getpid())
        batches = iter(make_loader(dataset, BATCH_SIZE, sampler=EpochSampler(dataset, seed=0), num_workers=2))
        for _ in range(100):
            next(batches)
        workers = children_of(os.getpid()) - before
        private = [private_megabytes(pid) for pid in workers]
        return {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, "per_worker": max(private)}


def children_of(pid):
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def private_megabytes(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


# --------------------------------------------------------------------------------------------------------- command


def machine(device):
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(": ")[1] if models else cpu
    return {
        "cpu": cpu,
        "cores": joblib.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "date": date.today().isoformat(),
    }


def table(results):
    """Rows of a Markdown table: (what, reference, ours, ratio)."""
    rows = []
    for side, rates in results.get("input", {}).items():
        for name in ("cold", "warm"):
            ratio = rates[name] / rates["reference"]
            row = (f"input, {side} px, {name}, images/s/core", f"{rates['reference']:.0f}", f"{rates[name]:.0f}")
            rows.append((*row, f"{ratio:.1f}x"))
    if step := results.get("step"):
        reference, ours = step["reference_images_per_second"], step["images_per_second"]
        rows.append((f"training step, images/s ({step['precision']})", f"{reference:.2f}", f"{ours:.2f}"))
        rows[-1] += (f"{ours / reference:.2f}x",)
        shares = f"{step['reference_share_of_peak']:.0%}", f"{step['share_of_peak']:.0%}"
        rows.append((f"share of the matrix peak, {step['peak_gflops']:.0f} GFLOP/s", *shares, ""))
    if evaluation := results.get("evaluation"):
        reference, ours = (evaluation["resamples_per_second"][name] for name in ("reference", "ours"))
        rows.append((f"bootstrap of {PREDICTIONS:,} predictions, resamples/s", f"{reference:.2f}", f"{ours:.0f}"))
        rows[-1] += (f"{ours / reference:.0f}x",)
        seconds = f"{evaluation['near_duplicates_s']:.1f}"
        rows.append((f"near-duplicates of {DUPLICATE_IMAGES:,} images, s", "", seconds, ""))
    for count, seconds in results.get("startup", {}).items():
        first, second = (f"{seconds[name]:.2f}" for name in ("first_s", "second_s"))
        rows.append((f"start, {count} files: first / second time, s", "", f"{first} / {second}", ""))
    for name, megabytes in results.get("memory_mb", {}).items():
        rows.append((f"memory with {INDEX_SIZE:,} images, MB: {name}", "", f"{megabytes:.0f}", ""))
    return "\n".join("| " + " | ".join(row) + " |" for row in [("", "reference", "ours", ""), ("---",) * 4, *rows])


def bench(argv=None):
    parts = {
        "input": "input",
        "step": "step",
        "evaluation": "evaluation",
        "startup": "startup",
        "memory": "memory_mb",
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="[all]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... [auto]")
    parser.add_argument("--compile", action="store_true", help="our step with torch.compile")
    parser.add_argument("--output", default="bench.json", help="[bench.json]")
    args = parser.parse_args(argv)
    device = main.choose_device(args.device)
    if "memory" in args.parts and not Path("/proc/self/smaps_rollup").exists():
        raise UserError("--parts: memory is measured on Linux only; name the others")
    measures = {
        "input": lambda: measure_input(device),
        "step": lambda: measure_step(device, args.compile),
        "evaluation": measure_evaluation,
        "startup": lambda: measure_startup(device),
        "memory": lambda: measure_memory(device),
    }
    results = {"machine": machine(device)}
    # memory first: what other parts leave in the process would count
    for part in sorted(args.parts, key=lambda part: part != "memory"):
        print(f"measuring {part} ...")
        results[parts[part]] = measures[part]()
        write_json(args.output, results)
    print(table(results))


if __name__ == "__main__":
    keep_freed_memory()
    try:
        bench()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
