import math
import shutil
import time

import pytest
import torch
from torch import nn

from engine import DeviceBatches, Engine, Mixer, RunningFigures, lr_lambda, progressive_size, resize, resolve_amp
from files import UserError
from model import Model
from utils import CBLoss, CrossEntropy

CPU = torch.device("cpu")


class SmallNet(nn.Module):
    """Stands for the ResNet where the engine alone is in question: bytes in, logits out, with batch norm."""

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
    """Without batch norm, whose statistics depend on how images are put into batches."""
    torch.manual_seed(0)
    engine = make_engine()
    engine.model, engine.grad_accum = nn.Sequential(ToFloat(), nn.Flatten(), nn.Linear(243, 3)), grad_accum
    engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=1e-2)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lr_lambda([(2, 1000)]))
    return engine


def one_epoch(engine, loader, epoch=0, **options):
    return engine.train_one_epoch(loader, RunningFigures(epoch, CPU), **options)


class ToFloat(nn.Module):
    def forward(self, images):
        return images / 255


def test_accumulated_batches_train_as_one_large_batch_does():
    small, large = [*batches(5, 8), *batches(1, 3)], []
    for first in range(0, 6, 4):  # 4 batches of 8; then one of 8 and one of 3
        images, targets = zip(*small[first : first + 4], strict=True)
        large.append((torch.cat(images), torch.cat(targets)))
    one, other = linear_engine(grad_accum=4), linear_engine()
    figures, expected = one_epoch(one, small), one_epoch(other, large)
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict())
    assert figures["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert one.scheduler.last_epoch == 2


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_an_epoch_left_after_any_step_and_gone_on_with_ends_the_same(grad_accum):
    whole = make_engine(grad_accum=grad_accum)
    expected = one_epoch(whole, batches(7))
    for left_after in range(1, 7 // grad_accum):
        engine, figures = make_engine(grad_accum=grad_accum), RunningFigures(0, CPU)
        with pytest.raises(KeyboardInterrupt):
            engine.train_one_epoch(batches(7), figures, after_step=leave_after(figures, left_after))
        position = figures.position()
        assert position["batches"] == left_after * grad_accum and position["images"] == 8 * position["batches"]
        again = RunningFigures(0, CPU, position)
        row = engine.train_one_epoch(batches(7)[position["batches"] :], again)
        assert all(row[name] == expected[name] for name in ("train_loss", "train_acc", "learning_rate"))
        torch.testing.assert_close(engine.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_an_epoch_left_after_its_last_step_has_only_its_figures_to_come():
    engine, figures = make_engine(), RunningFigures(0, CPU)
    row = engine.train_one_epoch(batches(3), figures)
    again = engine.train_one_epoch([], RunningFigures(0, CPU, figures.position()))
    assert {**again, "input_wait": 0} == {**row, "input_wait": 0, "images_per_second": again["images_per_second"]}


def leave_after(figures, steps):
    def after_step():
        if figures.steps == steps:
            raise KeyboardInterrupt

    return after_step


def test_progressive_sizes_grow_by_thirds_and_end_with_the_whole():
    assert [progressive_size(epoch, 12, 224) for epoch in range(12)] == [112] * 4 + [176] * 4 + [224] * 4
    assert [progressive_size(epoch, 3, 64) for epoch in range(3)] == [32, 48, 64]
    assert progressive_size(0, 1, 224) == 224 and progressive_size(0, 3, 32) == 32
    assert all(progressive_size(epochs - 1, epochs, 100) == 100 for epochs in range(1, 40))


def test_resizing_on_the_device_is_antialiased_and_keeps_bytes():
    checker = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255).to(torch.uint8).expand(2, 3, 64, 64)
    small = resize(checker, 16)
    assert small.shape == (2, 3, 16, 16) and small.dtype == torch.uint8
    assert (small.float() - 127.5).abs().max() < 10
    assert resize(checker, 64) is checker


def test_training_at_another_size_feeds_the_model_images_of_that_size():
    seen = []
    engine = make_engine()
    engine.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].shape[-1]))
    engine.model.layers[-1] = nn.Linear(8 * 3 * 3, 3)  # of 8 px images
    one_epoch(engine, batches(2), image_size=8)
    assert seen == [8, 8]


def test_the_share_of_waiting_is_measured():
    def slow_loader():
        for batch in batches(4):
            time.sleep(0.05)
            yield batch

    device_batches = DeviceBatches(slow_loader(), CPU)
    for _ in device_batches:
        time.sleep(0.2)
    assert 0.2 <= device_batches.seconds_waited() < 0.6  # of a second: 4 x 0.05 and what a busy machine adds
    assert one_epoch(make_engine(), batches())["input_wait"] < 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_that_are_copied_ahead_arrive_whole_and_in_order():
    expected = batches(12)
    device_batches = DeviceBatches([tuple(t.pin_memory() for t in batch) for batch in expected], torch.device("cuda"))
    got = [(images.cpu(), targets.cpu()) for images, targets in device_batches]
    for (images, targets), (other_images, other_targets) in zip(got, expected, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)
    assert device_batches.seconds_waited() >= 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_computes_the_same():
    plain, compiled = make_engine(), make_engine(compile=True)
    expected = one_epoch(plain, batches(2))["train_loss"]
    assert one_epoch(compiled, batches(2))["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_training_learns_in_each_precision(amp_dtype):
    engine = make_engine(amp_dtype)
    figures = [one_epoch(engine, batches(), epoch) for epoch in range(4)]
    assert figures[-1]["train_loss"] < figures[0]["train_loss"] / 2
    assert figures[-1]["train_acc"] > 0.9


def test_mean_loss_and_accuracy_are_over_images_not_over_batches():
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


def test_training_figures_are_those_of_the_forward_passes():
    engine = make_engine(lr=1e-12)
    loader = [*batches(2, 8), *batches(1, 3)]
    engine.model.train()
    with torch.no_grad():
        logits = [engine.model(images) for images, _ in loader]
    losses = [nn.functional.cross_entropy(z, t) * len(t) for z, (_, t) in zip(logits, loader, strict=True)]
    hits = sum(int((z.argmax(1) == t).sum()) for z, (_, t) in zip(logits, loader, strict=True))
    figures = one_epoch(engine, loader)
    assert figures["train_loss"] == pytest.approx(float(sum(losses)) / 19, rel=1e-4)
    assert figures["train_acc"] == pytest.approx(hits / 19)


def test_evaluation_changes_nothing():
    engine = make_engine()
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    engine.evaluate(batches(), "test")
    assert all(torch.equal(before[name], value) for name, value in engine.model.state_dict().items())


@pytest.mark.parametrize("bad_step", [0, 9, 11])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(bad_step):
    class Diverging(CrossEntropy):
        calls = 0

        def forward(self, logits, targets):
            self.calls += 1
            return super().forward(logits, targets) * (math.nan if self.calls == bad_step + 1 else 1)

    with pytest.raises(UserError, match=rf"loss is nan at epoch 7, step {bad_step}:"):
        one_epoch(make_engine(criterion=Diverging()), batches(), 7)


def test_a_gpu_without_memory_is_said_with_the_flags_that_help():
    class Large(CrossEntropy):
        def forward(self, logits, targets):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with pytest.raises(UserError, match=r"--batch_size: .*--grad_accum .*\(CUDA out of memory. Tried to .* GiB.\)$"):
        one_epoch(make_engine(criterion=Large()), batches())
    with pytest.raises(UserError, match="--batch_size"):
        make_engine(criterion=Large()).evaluate(batches(), "validation")


def test_gradient_is_clipped_to_its_norm():
    engine = make_engine(clip_grad=1e-3)
    engine.criterion = lambda logits, targets: 1e3 * logits.square().sum()
    one_epoch(engine, batches(1))
    norm = torch.stack([p.grad.norm() for p in engine.model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_learning_rate_warms_up_and_falls_along_half_a_cosine():
    factor = lr_lambda([(10, 110)])
    assert [factor(0), factor(4), factor(9), factor(10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [factor(60), factor(110), factor(999)] == pytest.approx([0.5, 0, 0])
    assert lr_lambda([(0, 10)])(0) == 1


def test_the_learning_rate_of_the_history_is_the_last_one_used():
    engine = make_engine(lr=1e-2)
    assert one_epoch(engine, batches(1))["learning_rate"] == pytest.approx(0.5e-2)


def test_amp_names_and_the_choice_for_this_machine():
    assert [resolve_amp(name, CPU) for name in ("off", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]
    assert resolve_amp("auto", CPU) in (None, torch.bfloat16)
    assert resolve_amp("auto", torch.device("meta")) is None


def test_weights_that_a_step_has_spoilt_are_noticed():
    engine = make_engine()
    engine.check_weights()
    with torch.no_grad():
        engine.model.layers[0].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match="the weights are not finite"):
        engine.check_weights()


# --------------------------------------------------------------------------------------- mixing, averaging, re-training


def test_cycles_of_the_learning_rate_follow_each_other():
    factor = lr_lambda([(2, 10), (0, 4)])
    assert [factor(step) for step in (0, 1, 2)] == [0.5, 1, 1]
    assert factor(9) < 0.1 and factor(10) == 1 and factor(12) == pytest.approx(0.5) and factor(14) == 0


@pytest.mark.parametrize("mixup, cutmix", [(0.4, 0), (0, 1.0), (0.4, 1.0)])
def test_images_are_mixed_with_the_one_before_by_the_share_that_is_told(mixup, cutmix):
    torch.manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    for _ in range(5):
        mixed, share = Mixer(mixup, cutmix)(images)
        expected = share * torch.arange(4.0) + (1 - share) * torch.arange(4.0).roll(1)
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), expected)


def test_the_loss_of_mixed_images_is_mixed_alike():
    engine = make_engine(mixer=lambda images: (images, 0.7))
    engine.model.normalise = lambda images: images
    images, targets = torch.zeros(3, 3, 9, 9, dtype=torch.uint8), torch.tensor([0, 1, 2])
    logits, loss = engine._logits_and_loss(images, targets)
    expected = 0.7 * engine.criterion(logits, targets) + 0.3 * engine.criterion(logits, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(loss, expected)


def test_averaged_weights_are_a_moving_average_and_are_what_is_evaluated():
    engine = make_engine(ema=0.9)
    loader, weights = batches(), []
    one_epoch(engine, loader, after_step=lambda: weights.append(engine.model.layers[-1].weight.detach().clone()))
    average = weights[0]
    for step, weight in enumerate(weights[1:], start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(engine.evaluated.layers[-1].weight, average)
    assert engine.evaluated is not engine.model


def test_a_new_head_is_trained_on_the_averaged_backbone_and_averaged_anew(thin_network):
    engine = Engine(Model(3), CrossEntropy(), torch.device("cpu"), clip_grad=1.0, ema=0.999)
    engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    engine.scheduler = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda step: 1)
    images, targets = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2])
    for _ in range(3):
        engine._step([(images, targets)], RunningFigures(0, engine.device), None)
    averaged = {name: value.clone() for name, value in engine.evaluated.state_dict().items()}
    engine.retrain_head(anew=True)
    engine.model.train()
    engine._step([(images, targets)], RunningFigures(1, engine.device), None)
    for name, value in engine.evaluated.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(value, averaged[name]), name
        else:  # after one step its average is itself
            assert torch.equal(value, engine.model.state_dict()[name]) and not torch.equal(value, averaged[name])


def test_mirrored_evaluation_averages_the_logits_of_both():
    engine = make_engine()
    images = torch.randint(0, 256, (1, 3, 9, 9), dtype=torch.uint8)
    loader = [(images, torch.tensor([0]))]
    _, both, _ = engine.evaluate(loader, "test", mirrored=True)
    engine.model.eval()
    with torch.inference_mode():
        logits = (engine.forward(engine.model, images) + engine.forward(engine.model, images.flip(-1))) / 2
    assert both == pytest.approx(logits.softmax(1).numpy(), rel=1e-5)
