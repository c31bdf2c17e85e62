"""The arithmetic of the benchmark, and that project and reference do the same work."""

import os

import numpy as np
import pytest
import torch

import bench
from flag_checks import parse_flags
from model import Model
from run.cores import num_cores
from run.machine import resolve_amp, set_float32_precision
from study import benchmark, benchmark_common, benchmark_reference, benchmark_step
from study.benchmark_table import format_table


def test_the_table_holds_the_ratios():
    rates = {"reference": 10.0, "cold": 60.0, "warm": 345.0}
    text = format_table({"input": {"1024": rates}, "memory_mb": {"per_worker": 23.4}})
    assert "| input, 1024 px, warm, images/s per core | 10 | 345 | 34.5x |" in text.splitlines()
    assert text.splitlines()[-1].endswith("per_worker |  | 23 |  |")


def test_the_table_of_a_gpu_has_a_row_per_batch_size_and_the_rates_of_an_epoch():
    rates = {"reference_images_per_second": 800.0, "images_per_second": 3000.0, "muon_images_per_second": 2850.0}
    shares = {"share_of_peak": 0.15, "reference_share_of_peak": 0.04}
    batches = {"32": {**rates, **shares}, "256": None}
    step = {"precision": "bfloat16", "gflop_per_image": 37.0, "peak_gflops": 740_000.0, "batches": batches}
    epoch = {"batch_size": 256, "training": 2950.0, "evaluation": 8100.0, "input_wait": 0.00123}
    assert format_table({"step": step, "epoch": epoch}).splitlines()[2:] == [
        "| training step, batch 32, images/s (bfloat16) | 800 | 3000 | 3.75x |",
        "| share of the matrix peak, 740000 GFLOP/s | 4% | 15% |  |",
        "| with --optimizer muon (reference: adamw), batch 32, images/s | 3000 | 2850 | 0.95x |",
        "| training step, batch 256, images/s (bfloat16) |  | out of memory |  |",
        "| training from the cache, batch 256, images/s |  | 2950 |  |",
        "| evaluation from the cache, batch 256, images/s |  | 8100 |  |",
        "| share of the training spent waiting for input |  | 0.12% |  |",
    ]


def test_the_efficiency_of_several_processes_is_their_rate_by_that_of_as_many_single_ones():
    one, two = (
        dict.fromkeys(("alone", "no_sync_bn", "together"), 50.0),
        {"alone": 96, "no_sync_bn": 90, "together": 75},
    )
    scaling = {"side": 32, "batch_size": 16, "gradient_mb": 94.1, "processes": {"1": one, "2": two}}
    assert format_table({"scaling": scaling}).splitlines()[2:] == [
        "| training by 1 process, 16 images each, 32 px, images/s | 50.00 | 50.00 | 1.00x |",
        "| training by 2 processes, 16 images each, 32 px, images/s | 100 | 75.00 | 0.75x |",
        "| share of the time for exchanging 94 MB of gradients / for `--sync_bn` |  | 5% / 17% |  |",
    ]


def test_what_is_timed_is_what_main_trains(thin_network, monkeypatch):
    """The settings of cuDNN, the precision, clipping and dropout; and with --compile, the size of the batch."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    set_float32_precision(None)
    engine = benchmark_common.training_engine(torch.device("cpu"), 8, ["--compile"])
    args = parse_flags(["--data_dirs", "."])
    assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32 == (engine.amp_dtype is not None)
    assert engine.amp_dtype is resolve_amp(args.amp, engine.device)
    assert (engine.clip_grad, engine.model.dropout.p) == (args.clip_grad, args.dropout_prob)
    assert engine.compiled_batch == 8


class Clock:
    """Stands in for the event of a GPU, which cannot be had on a CPU."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.time = Clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.time - self.time


def test_a_gpu_is_timed_by_its_own_clock_in_milliseconds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def compute():
        Clock.now += 250.0

    assert benchmark_reference.seconds_on(torch.device("cuda"), compute) == 0.25


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: unknown")])
def test_only_a_batch_that_does_not_fit_is_left_out(monkeypatch, error):
    def step_rates(*_):
        raise error

    monkeypatch.setattr(benchmark_step, "_step_rates", step_rates)
    if isinstance(error, torch.OutOfMemoryError):
        assert benchmark_step.step_rates_or_none(torch.device("cpu"), 256, False) is None
    else:
        with pytest.raises(RuntimeError, match="unknown"):
            benchmark_step.step_rates_or_none(torch.device("cpu"), 256, False)


def test_a_gpu_is_measured_at_two_batch_sizes_and_the_cpu_at_one():
    assert [benchmark_step.batch_sizes(torch.device(name)) for name in ("cpu", "cuda:1")] == [(32,), (32, 256)]


def test_the_work_of_a_training_image_is_that_of_the_stride_1_resnet50():
    """12.3 GFLOP forward at 224 px (torchvision's with stride 2: 8.2), the backward pass twice as much."""
    assert benchmark_step.gflop_per_image() == pytest.approx(37.0, abs=0.2)


def test_the_command_offers_every_part_and_no_other(tmp_path, monkeypatch):
    measured = []
    for part in bench.PARTS:
        monkeypatch.setattr(benchmark, f"measure_{part}", lambda *args, part=part: measured.append(part))
    monkeypatch.setattr(benchmark, "measure_scaling", lambda *_: pytest.fail("not asked for"))
    results = benchmark.measure_parts(bench.PARTS, torch.device("cpu"), False, tmp_path / "bench.json")
    assert sorted(measured) == sorted(bench.PARTS) and measured[0] == "memory"
    assert set(results) == {
        "machine",
        "memory_mb",
        "input",
        "step",
        "epoch",
        "sharing",
        "evaluation",
        "predict",
        "startup",
    }


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
    expected = [parameter.shape for parameter in Model(2).parameters()]
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
