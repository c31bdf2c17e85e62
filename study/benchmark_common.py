"""What the measurements of `bench.py` share: sizes, photographs, an engine like that of a training, medians."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch

from engine import Engine, build_engine
from flag_checks import parse_flags
from images.cache import ImageCache, read_all
from images.demo import draw_patch
from images.folders import ImageIndex, index_folders
from run.cores import num_cores
from schedule import new_optimizer
from utils import CBLoss

IMAGE_SIZE, BATCH_SIZE = 224, 32
GPU_BATCH_SIZE = 256  # of a GPU that is kept busy
SAMPLES_PER_CLS = (1000, 500, 200, 100, 50, 30, 20)
NUM_CLASSES = len(SAMPLES_PER_CLS)
NUM_PHOTOS, ROUNDS = 128, 3


def training_engine(device: torch.device, batch_size: int, flags: Sequence[str] = ()) -> Engine:
    """An engine with random weights, built as main.py builds it for these flags, in a process with its settings."""
    torch.set_num_threads(min(torch.get_num_threads(), num_cores()))
    torch.backends.cudnn.deterministic = True
    args = parse_flags(["--data_dirs", ".", "--no-pretrained", "--batch_size", str(batch_size), *flags])
    engine = build_engine(args, device, CBLoss(SAMPLES_PER_CLS), NUM_CLASSES)
    engine.optimizer = new_optimizer(engine.model, args)
    engine.scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer)
    return engine


def median_rates(measurements: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of several rounds. The measurements take turns, so that a change in the machine's speed affects all."""
    rates = {name: [] for name in measurements}
    for _ in range(ROUNDS):
        for name, measure in measurements.items():
            rates[name].append(measure())
    return {name: statistics.median(values) for name, values in rates.items()}


def write_photos(folder: Path, side: int, count: int | None = None) -> None:
    """Write different JPEGs of skin, `side` pixels wide and high, into two class folders. count: None for NUM_PHOTOS"""
    for number in range(NUM_PHOTOS if count is None else count):
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
