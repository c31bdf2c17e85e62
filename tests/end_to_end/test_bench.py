"""bench.py at a size that takes seconds: that every part is measured and written, and how the command ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import PATIENCE, ROOT
from small_bench import small_settings

import bench
from study import benchmark, benchmark_scaling


def run_small_bench(output, *flags):
    """-> content of bench.json"""
    with pytest.MonkeyPatch.context() as patch:
        for setting in small_settings():
            patch.setattr(*setting)
        patch.setattr(benchmark_scaling, "num_cores", lambda: 2)  # for --scaling 2, wherever this runs
        assert bench.main(["--device", "cpu", "--output", str(output), *flags]) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def small_bench(tmp_path_factory):
    return run_small_bench(tmp_path_factory.mktemp("bench") / "bench.json")


def test_every_part_is_measured_and_written(small_bench):
    assert set(small_bench) == {*bench.PARTS, "memory_mb", "machine"} - {"memory"}
    for rates in (small_bench["input"]["48"], small_bench["input"]["64"]):
        assert set(rates) == {"reference", "cold", "warm"} and all(rate > 0 for rate in rates.values())
    step = small_bench["step"]
    rates = step["batches"]["4"]
    share = rates["images_per_second"] * step["gflop_per_image"] / step["peak_gflops"]
    assert rates["share_of_peak"] == pytest.approx(share) and rates["reference_images_per_second"] > 0
    epoch = small_bench["epoch"]
    assert epoch["training"] > 0 and epoch["evaluation"] > 0 and 0 <= epoch["input_wait"] < 1
    assert epoch["batch_size"] == 4
    assert set(small_bench["sharing"]) == {"alone", "together"} and all(r > 0 for r in small_bench["sharing"].values())
    rates = small_bench["evaluation"]["resamples_per_second"]
    assert rates["ours"] > rates["reference"] > 0 and small_bench["evaluation"]["near_duplicates_s"] > 0
    assert set(small_bench["startup"]) == {"70", "140"}
    assert all(seconds["second_s"] > 0 for seconds in small_bench["startup"].values())
    for rates in (small_bench["predict"]["48"], small_bench["predict"]["64"]):
        assert set(rates) == {"cached", "files"} and all(rate > 0 for rate in rates.values())
    assert 0 < small_bench["memory_mb"]["per_worker"] < small_bench["memory_mb"]["process"]


def test_a_file_that_cannot_be_written_is_reported_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure_step", lambda *_: pytest.fail("measured"))
    output = tmp_path / "missing" / "bench.json"
    assert bench.main(["--device", "cpu", "--parts", "step", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(output.parent) in error and len(error.splitlines()) == 1


def test_a_device_that_is_not_available_is_one_line(tmp_path, capsys):
    assert bench.main(["--device", "cuda:99", "--output", str(tmp_path / "bench.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device: cuda:99 ") and len(error.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_benchmark_in_one_line(tmp_path, number):
    output = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "bench.py"), "--device", "cpu", "--parts", "step", "--output", str(output)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "measuring step ...\n"
        time.sleep(1)
        # a terminal sends Ctrl-C to the whole process group, a job queue SIGTERM to the process
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert error == f"stopped; {output} has the parts measured so far\n"
    assert set(json.loads(output.read_text())) == {"machine"}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """Of processes that torchrun starts."""
    return run_small_bench(tmp_path_factory.mktemp("scaling") / "bench.json", "--scaling", "2")


def test_one_training_by_two_processes_is_compared_with_one_by_a_single_process(scaled):
    assert set(scaled) == {"machine", "scaling"}
    one, two = (scaled["scaling"]["processes"][number] for number in ("1", "2"))
    assert one["alone"] == one["no_sync_bn"] == one["together"] > 0
    assert all(rate > 0 for rate in two.values()) and len(set(two.values())) == 3
    # 23.5 million weights of the ResNet-50 with a head of 7 classes, in float32
    assert scaled["scaling"]["gradient_mb"] == pytest.approx(94.1, abs=0.1)


@pytest.mark.parametrize("words, message", [("0", "name numbers from 1"), ("1 5000", "this machine has")])
def test_numbers_of_processes_that_cannot_be_are_one_line(tmp_path, capsys, words, message):
    flags = ["--device", "cpu", "--output", str(tmp_path / "bench.json"), "--scaling", *words.split()]
    assert bench.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --scaling: ") and message in error and len(error.splitlines()) == 1
