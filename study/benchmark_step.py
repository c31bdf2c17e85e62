"""Training steps on images that are on the device already, and epochs from the cache: measurements of `bench.py`."""

import functools
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from dataset_double import eval_loader, train_loader
from engine import RunningMetrics
from flag_checks import parse_flags
from flags import OPTIMIZERS
from model import Model
from run.cli import UserError
from run.machine import memory_format, out_of_memory_reason, resolve_amp
from study import benchmark_common as common
from study.benchmark_reference import reference_process, reference_step_rate, seconds_on

CPU_STEPS = 2  # timed training steps per round
GPU_IMAGES = 2560  # the same on a GPU, in images
MATRIX_SIZES = {"cpu": 4096, "cuda": 8192}  # the first is too small to keep a large GPU busy
EPOCH_PHOTOS = {"cpu": 64, "cuda": 1024}
EPOCH_COPIES = {"cpu": 1, "cuda": 8}  # how often each photograph is trained on in an epoch


def batch_sizes(device: torch.device) -> tuple[int, ...]:
    """-> those that are measured. A large GPU may compute a batch of 32 faster than its kernels can be launched."""
    return (common.BATCH_SIZE, common.GPU_BATCH_SIZE) if device.type == "cuda" else (common.BATCH_SIZE,)


def measure_step(device: torch.device, compile: bool) -> dict:
    """Training steps on images that are on the device already: forward, backward, optimizer.

    -> the precision, GFLOP per image, GFLOP/s of a matrix product, and "batches": {batch size: rates in images/s and
    their shares of that product's speed; None if the memory of the GPU is too small}
    """
    dtype = resolve_amp("auto", device) or torch.float32
    gflop, peak = gflop_per_image(), matrix_peak(dtype, device)
    batches = {}
    for batch_size in batch_sizes(device):
        rates = step_rates_or_none(device, batch_size, compile)
        batches[str(batch_size)] = rates and {
            **rates,
            "share_of_peak": rates["images_per_second"] * gflop / peak,
            "reference_share_of_peak": rates["reference_images_per_second"] * gflop / peak,
        }
    precision = str(dtype).removeprefix("torch.")
    return {"precision": precision, "gflop_per_image": gflop, "peak_gflops": peak, "batches": batches}


def step_rates_or_none(device: torch.device, batch_size: int, compile: bool) -> dict[str, float] | None:
    """Images per second of the reference, and of this project with both optimizers, or None if the memory of the GPU is
    too small."""
    try:
        return _step_rates(device, batch_size, compile)
    except (RuntimeError, UserError) as error:
        if not out_of_memory_reason(error):
            raise
        return None


def _step_rates(device, batch_size, compile):
    steps = max(1, GPU_IMAGES // batch_size) if device.type == "cuda" else CPU_STEPS
    flags = ["--compile"] * compile
    engines = [common.training_engine(device, batch_size, [*flags, "--optimizer", name]) for name in OPTIMIZERS]
    size = common.IMAGE_SIZE
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=memory_format(device))
    targets = torch.arange(batch_size, device=device) % common.NUM_CLASSES

    def train(engine, steps):
        engine.train_one_epoch([(images, targets)] * steps, RunningMetrics(0, device))

    def ours(engine):
        train(engine, 1)  # not timed, as in the reference
        return steps * batch_size / seconds_on(device, lambda: train(engine, steps))

    with reference_process() as process:

        def reference():
            return process.submit(reference_step_rate, device, common.SAMPLES_PER_CLS, batch_size, size, steps).result()

        measurements = {"reference_images_per_second": reference}
        for name, engine in zip(("images_per_second", "muon_images_per_second"), engines, strict=True):
            measurements[name] = functools.partial(ours, engine)
        for measure in measurements.values():
            measure()
        return common.median_rates(measurements)


def gflop_per_image() -> float:
    """GFLOP of the forward and backward pass; a multiplication and an addition are two operations."""
    with torch.device("meta"):
        model, image = Model(common.NUM_CLASSES), torch.empty(1, 3, common.IMAGE_SIZE, common.IMAGE_SIZE)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return counter.get_total_flops() / 1e9


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a product of two large square matrices, the best of five."""
    n = MATRIX_SIZES.get(device.type, MATRIX_SIZES["cpu"])
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = [seconds_on(device, lambda: a @ b) for _ in range(6)]
    return 2 * n**3 / min(seconds[1:]) / 1e9


def measure_epoch(device: torch.device, compile: bool) -> dict[str, float]:
    """Epochs as main.py runs them, from the cache of decoded images, every image augmented.

    -> {"batch_size", "training" and "evaluation" in images per second, "input_wait": share of the training's time}
    """
    kind = device.type if device.type in EPOCH_PHOTOS else "cpu"
    batch_size = batch_sizes(device)[-1]
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        common.write_photos(photos, common.IMAGE_SIZE, EPOCH_PHOTOS[kind])
        index = common.read_into_cache(photos, Path(folder, "cache"))
        flags = ["--data_dirs", str(photos), "--image_size", str(common.IMAGE_SIZE), "--batch_size", str(batch_size)]
        copies = EPOCH_COPIES[kind] * int(index.counts().max())
        args = parse_flags([*flags, "--use_augmentation", "--augment_all", "--target_samples_per_class", str(copies)])
        loader = train_loader(index, args, device, use_augmentation=True, sampling=args.sampling)
        engine, in_order = (
            common.training_engine(device, batch_size, ["--compile"] * compile),
            eval_loader(index, args, device),
        )

        def train(epoch):
            loader.batch_sampler.sampler.set_epoch(epoch)
            return engine.train_one_epoch(loader, RunningMetrics(epoch, device))

        def evaluate():
            return len(index) / seconds_on(device, lambda: engine.evaluate(in_order, "evaluation"))

        engine.train_one_epoch([next(iter(loader))[:2]], RunningMetrics(0, device))  # slower, as the first step
        evaluate()
        rows = [train(epoch) for epoch in range(common.ROUNDS)]
        return {
            "batch_size": batch_size,
            "training": statistics.median(row["images_per_second"] for row in rows),
            "evaluation": statistics.median(evaluate() for _ in rows),
            "input_wait": statistics.median(row["input_wait"] for row in rows),
        }
