"""Batches on the device: in order, and how long they are waited for."""

import pytest
import torch

from images.device_batches import DeviceBatches


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_copied_ahead_arrive_intact_and_in_order():
    images = torch.randint(0, 256, (96, 3, 9, 9), dtype=torch.uint8)
    expected = list(zip(images.split(8), torch.arange(96).split(8), strict=True))
    device_batches = DeviceBatches([tuple(t.pin_memory() for t in batch) for batch in expected], torch.device("cuda"))
    received = [(images.cpu(), targets.cpu()) for images, targets in device_batches]
    for (images, targets), (expected_images, expected_targets) in zip(received, expected, strict=True):
        assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)
    assert device_batches.seconds_waited() >= 0
