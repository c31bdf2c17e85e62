"""bench.py at a size that takes seconds: that each part measures, and what it writes."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

import bench


@pytest.fixture(scope="module")
def small_bench(tmp_path_factory):
    """-> (what bench.json holds, what was printed)."""
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"IMAGE_SIZE": 32, "BATCH_SIZE": 4, "SOURCE_SIDES": (48, 64), "PHOTOS": 8, "ROUNDS": 1}
        for name, value in {
            **sizes,
            "STARTUP_FILES": (70, 140),
            "INDEX_SIZE": 1000,
            "MATRIX_SIZE": 64,
            "PREDICTIONS": 500,
            "DUPLICATE_IMAGES": 50,
        }.items():
            patch.setattr(bench, name, value)
        # in this process, which knows the small sizes
        patch.setattr(bench, "usual_process", lambda: ThreadPoolExecutor(1))
        bench.bench(["--device", "cpu", "--output", str(output)])
    return json.loads(output.read_text())


def test_every_part_is_measured_and_written(small_bench):
    assert set(small_bench) == {"input", "step", "evaluation", "startup", "memory_mb", "machine"}
    for rates in (small_bench["input"]["48"], small_bench["input"]["64"]):
        assert set(rates) == {"reference", "cold", "warm"} and all(rate > 0 for rate in rates.values())
    step = small_bench["step"]
    assert step["share_of_peak"] == pytest.approx(
        step["images_per_second"] * step["gflop_per_image"] / step["peak_gflops"]
    )
    assert step["reference_images_per_second"] > 0
    rates = small_bench["evaluation"]["resamples_per_second"]
    assert rates["ours"] > rates["reference"] > 0 and small_bench["evaluation"]["near_duplicates_s"] > 0
    assert set(small_bench["startup"]) == {"70", "140"}
    assert all(seconds["second_s"] > 0 for seconds in small_bench["startup"].values())
    assert 0 < small_bench["memory_mb"]["per_worker"] < small_bench["memory_mb"]["process"]


def test_the_table_holds_the_ratios():
    rates = {"reference": 10.0, "cold": 60.0, "warm": 345.0}
    text = bench.table({"input": {"1024": rates}, "memory_mb": {"per_worker": 23.4}})
    assert "| input, 1024 px, warm, images/s/core | 10 | 345 | 34.5x |" in text.splitlines()
    assert text.splitlines()[-1].endswith("per_worker |  | 23 |  |")


def test_the_work_of_a_training_image_is_that_of_the_stride_1_resnet50():
    """12.3 GFLOP forward at 224 px (torchvision's with stride 2: 8.2), the backward pass twice as much."""
    assert bench.gflop_per_image() == pytest.approx(37.0, abs=0.2)
