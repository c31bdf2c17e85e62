"""The moving average of the weights."""

import torch

from averaging import MovingAverage


def test_statistics_of_batch_norm_are_averaged_and_its_counter_is_copied():
    model = torch.nn.BatchNorm1d(1)
    average = MovingAverage(model, decay=0.9)
    for mean in (2.0, 7.5):
        model.running_mean.fill_(mean)
        model.num_batches_tracked += 1
        average.update()
    # the first step is copied, and the decay of the second is (1 + 1) / (10 + 1)
    torch.testing.assert_close(average.model.running_mean, torch.tensor([2 * 2 / 11 + 7.5 * 9 / 11]))
    assert average.model.num_batches_tracked == 2
