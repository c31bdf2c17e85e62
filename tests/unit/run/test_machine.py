"""The precision that `--amp` selects."""

import torch

from run.machine import resolve_amp

CPU = torch.device("cpu")


def test_amp_names_a_dtype_and_auto_uses_one_the_device_supports():
    assert [resolve_amp(name, CPU) for name in ("off", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]
    assert resolve_amp("auto", CPU) in (None, torch.bfloat16)
    assert resolve_amp("auto", torch.device("meta")) is None
