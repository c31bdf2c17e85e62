"""Photographs decoded ahead: order, unreadable ones, and how many are in memory."""

import numpy as np
import pytest
from helpers import write_images

import images.decode_ahead
from images.decode import read_image
from images.decode_ahead import DecodedBatches


@pytest.fixture
def paths(tmp_path):
    """10 photographs; the third and the last two are damaged."""
    paths = list(map(str, write_images(tmp_path, 10)))
    for i in (2, 8, 9):
        with open(paths[i], "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
    return paths


def test_batches_are_full_of_readable_photographs_in_their_order(paths):
    batches = list(DecodedBatches(paths, 32, "pad", 3))
    assert [positions.tolist() for _, positions in batches] == [[0, 1, 3], [4, 5, 6], [7]]
    for batch, positions in batches:
        expected = [read_image(paths[i], 32, "pad") for i in positions]
        assert (batch.permute(0, 2, 3, 1).numpy() == np.stack(expected)).all()
        assert batch.permute(0, 2, 3, 1).is_contiguous()  # as those of a loader: copied to the device as they are


def test_reasons_are_returned_once_in_their_turn(paths):
    decoded = DecodedBatches(paths, 32, "stretch", 3)
    for _ in decoded:
        pass
    assert list(decoded.take_reasons(5)) == [2] and not decoded.take_reasons(8)
    reasons = decoded.take_reasons(10)
    assert list(reasons) == [8, 9] and "PNG" in reasons[9]


def test_no_more_is_decoded_ahead_than_two_batches(paths, monkeypatch):
    decoded_paths = []

    def decode(path, size, resize):
        decoded_paths.append(path)
        return np.zeros((size, size, 3), np.uint8), None

    monkeypatch.setattr(images.decode_ahead, "decode", decode)
    batches = DecodedBatches([str(i) for i in range(1000)], 32, "stretch", 4)
    for number, _ in enumerate(batches, start=1):
        assert len(decoded_paths) <= 4 * number + 8


def test_many_unreadable_photographs_do_not_pile_up(paths, monkeypatch):
    monkeypatch.setattr(images.decode_ahead, "MAX_UNREADABLE", 5)
    decoded = DecodedBatches([paths[8]] * 12 + paths[:2], 32, "stretch", 2)
    assert [positions.tolist() for _, positions in decoded] == [[], [], [12, 13]]
    assert len(decoded.take_reasons(14)) == 12
