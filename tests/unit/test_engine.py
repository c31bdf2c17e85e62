"""Training for one epoch and evaluation, on a small network."""

import functools
import math
import os
import shutil
import signal
import time

import pytest
import torch
from torch import nn

import dataset_double
from engine import DeviceBatches, Engine, Mixer, RunningMetrics
from images.augment import views
from model import Model
from run.cli import UserError
from schedule import lr_lambda
from utils import CBLoss, CrossEntropy

CPU = torch.device("cpu")


class SmallNet(nn.Module):
    """Replaces the ResNet in tests of the engine alone: uint8 images in, logits out, with batch norm."""

    def __init__(self, classes=3):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)
        )

    def forward(self, images):
        return self.layers(images / 255)


def batches(count=12, size=8, classes=3):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count * size) % classes
    images = torch.randint(0, 60, (count * size, 3, 9, 9), generator=generator, dtype=torch.uint8)
    images += (targets * 60).to(torch.uint8)[:, None, None, None]
    return list(zip(images.split(size), targets.split(size), strict=True))


def make_engine(amp_dtype=None, criterion=None, lr=1e-2, **options):
    torch.manual_seed(0)
    model = SmallNet()
    model(torch.zeros(2, 3, 9, 9))
    engine = Engine(model, criterion or CrossEntropy(), CPU, amp_dtype, **{"clip_grad": 1.0, **options})
    engine.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lr_lambda([(2, 1000)]))
    return engine


def linear_engine(grad_accum=1):
    """Has no batch norm: its statistics depend on how images are grouped into batches."""
    torch.manual_seed(0)
    engine = make_engine()
    engine.model, engine.grad_accum = nn.Sequential(ToFloat(), nn.Flatten(), nn.Linear(243, 3)), grad_accum
    engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=1e-2)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lr_lambda([(2, 1000)]))
    return engine


def one_epoch(engine, loader, epoch=0, **options):
    return engine.train_one_epoch(loader, RunningMetrics(epoch, CPU), **options)


class ToFloat(nn.Module):
    def forward(self, images):
        return images / 255


def test_accumulated_batches_are_equivalent_to_one_large_batch():
    small_batches, large_batches = [*batches(5, 8), *batches(1, 3)], []
    for first in range(0, 6, 4):  # 4 batches of 8, then one of 8 and one of 3
        images, targets = zip(*small_batches[first : first + 4], strict=True)
        large_batches.append((torch.cat(images), torch.cat(targets)))
    accumulating, plain = linear_engine(grad_accum=4), linear_engine()
    metrics, expected = one_epoch(accumulating, small_batches), one_epoch(plain, large_batches)
    torch.testing.assert_close(accumulating.model.state_dict(), plain.model.state_dict())
    assert metrics["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert accumulating.scheduler.last_epoch == 2


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_an_epoch_interrupted_after_any_step_resumes_exactly(grad_accum):
    uninterrupted = make_engine(grad_accum=grad_accum)
    expected = one_epoch(uninterrupted, batches(7))
    for steps in range(1, 7 // grad_accum):
        engine, running_metrics = make_engine(grad_accum=grad_accum), RunningMetrics(0, CPU)
        with pytest.raises(KeyboardInterrupt):
            engine.train_one_epoch(batches(7), running_metrics, after_step=interrupt_after(running_metrics, steps))
        position = running_metrics.epoch_state()
        assert position["batches"] == steps * grad_accum and position["images"] == 8 * position["batches"]
        resumed = RunningMetrics(0, CPU, position)
        metrics = engine.train_one_epoch(batches(7)[position["batches"] :], resumed)
        assert all(metrics[name] == expected[name] for name in ("train_loss", "train_acc", "learning_rate"))
        torch.testing.assert_close(engine.model.state_dict(), uninterrupted.model.state_dict(), rtol=0, atol=0)


def test_an_epoch_interrupted_after_its_last_step_only_has_to_report_its_metrics():
    engine, running_metrics = make_engine(), RunningMetrics(0, CPU)
    metrics = engine.train_one_epoch(batches(3), running_metrics)
    resumed = engine.train_one_epoch([], RunningMetrics(0, CPU, running_metrics.epoch_state()))
    untimed = {"input_wait": 0, "images_per_second": resumed["images_per_second"]}
    assert {**resumed, "input_wait": 0} == {**metrics, **untimed}


def interrupt_after(running_metrics, steps):
    def after_step():
        if running_metrics.steps == steps:
            raise KeyboardInterrupt

    return after_step


def test_training_resizes_images_to_image_size():
    sizes = []
    engine = make_engine()
    engine.model.register_forward_pre_hook(lambda model, inputs: sizes.append(inputs[0].shape[-1]))
    engine.model.layers[-1] = nn.Linear(8 * 3 * 3, 3)  # for 8-pixel images
    one_epoch(engine, batches(2), image_size=8)
    assert sizes == [8, 8]


def test_the_time_spent_waiting_for_images_is_measured():
    def slow_loader():
        for batch in batches(4):
            time.sleep(0.05)
            yield batch

    device_batches = DeviceBatches(slow_loader(), CPU)
    for _ in device_batches:
        time.sleep(0.2)
    assert 0.2 <= device_batches.seconds_waited() < 0.6  # seconds: 4 x 0.05, and more on a busy machine
    assert one_epoch(make_engine(), batches())["input_wait"] < 0.2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_has_the_same_loss_and_parameter_names():
    plain, compiled = make_engine(), make_engine(compiled_batch=8)
    expected = one_epoch(plain, batches(2))["train_loss"]
    assert one_epoch(compiled, batches(2))["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize("ema", [0, 0.9])
def test_only_full_batches_are_compiled_once_each_for_training_and_evaluation(ema, monkeypatch):
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.append(next(len(i) for i in inputs if i.dtype == torch.uint8))
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    engine = make_engine(compiled_batch=8, ema=ema)
    for epoch in range(2):
        one_epoch(engine, [*batches(2, 8), *batches(1, 3)], epoch)
        engine.evaluate([*batches(2, 16), *batches(1, 5)], "val")
    assert sizes == [8, 16]


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_training_converges_in_every_precision(amp_dtype):
    engine = make_engine(amp_dtype)
    history = [one_epoch(engine, batches(), epoch) for epoch in range(4)]
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 2
    assert history[-1]["train_acc"] > 0.9


def test_the_evaluation_loss_is_a_mean_over_images_not_over_batches():
    loader = [(torch.zeros(6, 3, 9, 9, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)),
              (torch.full((2, 3, 9, 9), 200, dtype=torch.uint8), torch.ones(2, dtype=torch.int64))]  # fmt: skip
    engine = make_engine(criterion=CBLoss([6, 3, 2]))
    loss, probabilities, targets = engine.evaluate(loader, "test")
    images = torch.cat([images for images, _ in loader])
    with torch.inference_mode():
        expected = CBLoss([6, 3, 2])(engine.model.eval()(images), torch.from_numpy(targets))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert probabilities.shape == (8, 3) and probabilities.sum(1) == pytest.approx(1)
    assert targets.tolist() == [0] * 6 + [1] * 2


def test_training_metrics_are_those_of_the_forward_passes():
    engine = make_engine(lr=1e-12)
    loader = [*batches(2, 8), *batches(1, 3)]
    engine.model.train()
    with torch.no_grad():
        logits = [engine.model(images) for images, _ in loader]
    losses = [nn.functional.cross_entropy(z, t) * len(t) for z, (_, t) in zip(logits, loader, strict=True)]
    correct = sum(int((z.argmax(1) == t).sum()) for z, (_, t) in zip(logits, loader, strict=True))
    metrics = one_epoch(engine, loader)
    assert metrics["train_loss"] == pytest.approx(float(sum(losses)) / 19, rel=1e-4)
    assert metrics["train_acc"] == pytest.approx(correct / 19)


def test_evaluation_leaves_the_model_unchanged():
    engine = make_engine()
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.evaluate(batches(), "test")
    assert all(torch.equal(before[name], value) for name, value in engine.model.state_dict().items())


@pytest.mark.parametrize("bad_step", [0, 9, 11])
def test_a_non_finite_loss_is_an_error_that_names_epoch_and_step(bad_step):
    class Diverging(CrossEntropy):
        calls = 0

        def forward(self, logits, targets):
            self.calls += 1
            return super().forward(logits, targets) * (math.nan if self.calls == bad_step + 1 else 1)

    with pytest.raises(UserError, match=rf"loss is nan at epoch 7, step {bad_step}:"):
        one_epoch(make_engine(criterion=Diverging()), batches(), 7)


def test_the_gradient_is_clipped_by_its_norm():
    engine = make_engine(clip_grad=1e-3)
    engine.criterion = lambda logits, targets: 1e3 * logits.square().sum()
    one_epoch(engine, batches(1))
    norm = torch.stack([p.grad.norm() for p in engine.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_reported_learning_rate_is_that_of_the_last_step():
    engine = make_engine(lr=1e-2)
    assert one_epoch(engine, batches(1))["learning_rate"] == pytest.approx(0.5e-2)


def test_non_finite_weights_are_detected():
    engine = make_engine()
    engine.check_weights()
    with torch.no_grad():
        engine.model.layers[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="the weights are not finite"):
        engine.check_weights()


# --------------------------------------------------------------------------------- mixup, averaged weights, re-training


@pytest.mark.parametrize("mixup, cutmix", [(0.4, 0), (0, 1.0), (0.4, 1.0)])
def test_each_image_is_mixed_with_the_previous_one_in_the_returned_share(mixup, cutmix):
    torch.manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    for _ in range(5):
        mixed, share = Mixer(mixup, cutmix)(images)
        expected = share * torch.arange(4.0) + (1 - share) * torch.arange(4.0).roll(1)
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected)


def test_the_loss_is_mixed_in_the_same_share_as_the_images():
    engine = make_engine(mixer=lambda images: (images, 0.7))
    engine.model.normalize = lambda images: images
    images, targets = torch.zeros(3, 3, 9, 9, dtype=torch.uint8), torch.tensor([0, 1, 2])
    logits, _, loss = engine._logits_and_loss(images, targets, whole=3)
    expected = 0.7 * engine.criterion(logits, targets) + 0.3 * engine.criterion(logits, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(loss, expected)


def test_evaluation_uses_a_moving_average_of_the_weights():
    engine = make_engine(ema=0.9)
    loader, weights = batches(), []
    one_epoch(engine, loader, after_step=lambda: weights.append(engine.model.layers[-1].weight.detach().clone()))
    average = weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(engine.evaluated.layers[-1].weight, average)
    assert engine.evaluated is not engine.model


def test_a_new_head_uses_the_averaged_backbone_and_starts_a_new_average(thin_network):
    engine = Engine(Model(3), CrossEntropy(), torch.device("cpu"), clip_grad=1.0, ema=0.999)
    engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda step: 1)
    images, targets = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2])
    for _ in range(3):
        engine._step([((images, targets), None)], RunningMetrics(0, engine.device), None)
    averaged = {name: value.clone() for name, value in engine.evaluated.state_dict().items()}
    engine.retrain_head(reset=True)
    engine.model.train()
    engine._step([((images, targets), None)], RunningMetrics(1, engine.device), None)
    for name, value in engine.evaluated.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, averaged[name]), name
        else:  # after one step, the average is the head itself
            assert torch.equal(value, engine.model.state_dict()[name]) and not torch.equal(value, averaged[name])


@pytest.mark.parametrize("at_any_angle", [False, True])
def test_test_time_augmentation_averages_the_logits_of_all_views(at_any_angle):
    engine = make_engine()
    images = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8)
    loader = [(images, torch.tensor([0]))]
    _, probabilities, _ = engine.evaluate(loader, "test", views=functools.partial(views, at_any_angle=at_any_angle))
    engine.model.eval()
    with torch.inference_mode():
        seen = [images, images.flip(-1)]
        if at_any_angle:  # all symmetries of the square
            seen += [view.flip(-2) for view in seen]
            seen += [view.transpose(-1, -2) for view in seen]
        logits = sum(engine.forward(engine.model, view.contiguous()) for view in seen) / len(seen)
    assert probabilities == pytest.approx(logits.softmax(1).numpy(), rel=1e-5)


class SignalingDataset(torch.utils.data.Dataset):
    """Sends a signal to the loader worker that loads the first batch."""

    def __init__(self, number):
        self.number = number

    def __getitems__(self, positions):
        if positions[0] == 0:
            os.kill(os.getpid(), self.number)
        return torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.tensor(positions)

    def __len__(self):
        return 4


def test_a_loader_worker_that_receives_sigterm_still_returns_its_batches():
    loader = dataset_double.make_loader(SignalingDataset(signal.SIGTERM), 1, num_workers=1)
    assert [targets.item() for _, targets in loader] == [0, 1, 2, 3]


def test_a_killed_loader_worker_is_one_error_line():
    loader = dataset_double.make_loader(SignalingDataset(signal.SIGKILL), 1, num_workers=1)
    with pytest.raises(UserError, match=r"--num_workers: a loader worker died") as caught:
        make_engine().train_one_epoch(loader, RunningMetrics(0, torch.device("cpu")))
    assert "\n" not in str(caught.value)


def test_running_out_of_gpu_memory_is_an_error_that_names_the_flags_that_help():
    class OutOfMemory(CrossEntropy):
        def forward(self, logits, targets):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with pytest.raises(UserError, match=r"--batch_size: .*--grad_accum .*\(CUDA out of memory. Tried to .* GiB.\)$"):
        one_epoch(make_engine(criterion=OutOfMemory()), batches())
    with pytest.raises(UserError, match="--batch_size"):
        make_engine(criterion=OutOfMemory()).evaluate(batches(), "validation")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux lists them")
def test_an_evaluation_keeps_no_shared_memory_of_its_workers():
    """Each batch that is kept would take an open file: an evaluation of many images would reach the limit."""
    open_files = []
    images = [(torch.zeros(3, 9, 9, dtype=torch.uint8), target % 3) for target in range(60)]
    loader = dataset_double.DataLoader(images, 2, num_workers=1)
    make_engine().evaluate(loader, "val", lambda: open_files.append(len(os.listdir("/proc/self/fd"))))
    assert max(open_files) < open_files[0] + 15
