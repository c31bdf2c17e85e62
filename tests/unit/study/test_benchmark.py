"""The arithmetic of the benchmark, and that project and reference do the same work."""

import os

import numpy as np
import pytest
import torch

import bench
from run.cores import num_cores
from study import benchmark, benchmark_reference


def test_the_table_holds_the_ratios():
    rates = {"reference": 10.0, "cold": 60.0, "warm": 345.0}
    text = benchmark.format_table({"input": {"1024": rates}, "memory_mb": {"per_worker": 23.4}})
    assert "| input, 1024 px, warm, images/s per core | 10 | 345 | 34.5x |" in text.splitlines()
    assert text.splitlines()[-1].endswith("per_worker |  | 23 |  |")


def test_the_work_of_a_training_image_is_that_of_the_stride_1_resnet50():
    """12.3 GFLOP forward at 224 px (torchvision's with stride 2: 8.2), the backward pass twice as much."""
    assert benchmark.gflop_per_image() == pytest.approx(37.0, abs=0.2)


def test_the_command_offers_every_part_and_no_other(tmp_path, monkeypatch):
    measured = []
    for part in bench.PARTS:
        monkeypatch.setattr(benchmark, f"measure_{part}", lambda *args, part=part: measured.append(part))
    results = benchmark.measure_parts(bench.PARTS, torch.device("cpu"), False, tmp_path / "bench.json")
    assert sorted(measured) == sorted(bench.PARTS) and measured[0] == "memory"
    assert set(results) == {"machine", "memory_mb", "input", "step", "sharing", "evaluation", "predict", "startup"}


def test_one_core_limits_torch_and_the_decoding_threads_and_restores_both(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    threads = torch.get_num_threads()
    with benchmark.one_core():
        assert num_cores() == torch.get_num_threads() == 1
    assert os.environ["LOKY_MAX_CPU_COUNT"] == "2" and torch.get_num_threads() == threads
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT")
    with benchmark.one_core():
        pass
    assert "LOKY_MAX_CPU_COUNT" not in os.environ


def test_the_reference_trains_the_same_network_in_every_step_it_times(monkeypatch):
    """A step before the timed ones, the weights of the stride-1 ResNet-50, and no step that does nothing."""
    steps, real_step = [], torch.optim.Adam.step

    def step(optimizer):
        steps.append([parameter.shape for parameter in optimizer.param_groups[0]["params"]])
        return real_step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    rate = benchmark_reference.reference_step_rate(torch.device("cpu"), (4, 3), 2, 32, steps=2)
    expected = [parameter.shape for parameter in benchmark.Model(2).parameters()]
    assert rate > 0 and steps == [expected] * 3


def test_the_reference_runs_in_a_process_without_the_readers_of_the_project():
    with benchmark_reference.reference_process() as process:
        process.submit(exec, "import study.benchmark_reference").result()
        modules = set(process.submit(eval, "list(__import__('sys').modules)").result())
    assert "torch" in modules and not modules & {"cv2", "images", "dataset_double", "engine"}


def test_the_reference_resample_keeps_the_size_of_each_class(monkeypatch):
    seen = []
    monkeypatch.setattr(
        benchmark_reference.sk_metrics,
        "precision_recall_fscore_support",
        lambda targets, predictions, **_: seen.append(np.bincount(targets)),
    )
    targets = np.repeat([0, 1, 2], [30, 12, 5])
    probabilities = np.random.default_rng(0).random((len(targets), 3))
    benchmark_reference.reference_resample(targets, probabilities, np.random.default_rng(1))
    assert seen[0].tolist() == [30, 12, 5]
