"""Files of torch.save that are intact, changed, or missing."""

import pytest
import torch

from run.cli import Damaged, UserError
from run.torch_file import read_torch_file


@pytest.fixture
def path(tmp_path):
    torch.save({"weight": torch.arange(1000.0)}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def test_an_intact_file_is_read(path):
    assert torch.equal(read_torch_file(path, "--weights")["weight"], torch.arange(1000.0))


def test_a_changed_byte_that_torch_load_accepts_is_detected(path):
    content = path.read_bytes()
    position = content.index(torch.arange(1000.0).numpy().tobytes()) + 2
    path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert not torch.equal(torch.load(path)["weight"], torch.arange(1000.0))
    with pytest.raises(Damaged, match=r"^--weights: .*weights\.pth is damaged: its record .* fails its checksum$"):
        read_torch_file(path, "--weights")


def test_a_missing_file_is_not_reported_as_damaged(tmp_path):
    with pytest.raises(UserError, match=r"^--resume: .*gone\.pth cannot be read: No such file") as caught:
        read_torch_file(tmp_path / "gone.pth", "--resume")
    assert not isinstance(caught.value, Damaged)
