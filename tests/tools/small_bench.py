"""bench.py at sizes that take seconds, for tests and for the dry run of gpu_check.py."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bench
from run.cli import end_process
from study import benchmark, benchmark_common, benchmark_scaling, benchmark_sharing, benchmark_step

SMALL_SIZES = {
    benchmark_common: {"IMAGE_SIZE": 32, "BATCH_SIZE": 4, "NUM_PHOTOS": 8, "ROUNDS": 1},
    benchmark: {
        "PHOTO_SIDES": (48, 64),
        "STARTUP_FILES": (70, 140),
        "INDEX_SIZE": 1000,
        "NUM_PREDICTIONS": 500,
        "NUM_DUPLICATE_IMAGES": 50,
    },
    benchmark_step: {"CPU_STEPS": 1, "MATRIX_SIZES": {"cpu": 64}, "EPOCH_PHOTOS": {"cpu": 8}},
    benchmark_sharing: {"SIDE": 32, "BATCH": 2, "SECONDS": 0},
    benchmark_scaling: {"BATCHES": {"cpu": 2}, "SECONDS": 0},
}


def small_settings():
    """-> (module, name, value) of everything that makes bench.py fast"""
    for module, sizes in SMALL_SIZES.items():
        yield from ((module, name, value) for name, value in sizes.items())
    # the reference in this process: a new one takes seconds to import torch
    for module in (benchmark, benchmark_step, benchmark_sharing):
        yield module, "reference_process", lambda: ThreadPoolExecutor(1)


if __name__ == "__main__":
    for setting in small_settings():
        setattr(*setting)
    end_process(bench.main(sys.argv[1:]))
