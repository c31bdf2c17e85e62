"""What bench.py --scaling says if a process of torchrun fails."""

import pytest

from study.benchmark_scaling import reason_of

SUMMARY = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n
Failures:
  <NO_OTHER_FAILURES>
Root Cause (first observed failure):
  rank      : 0 (local_rank: 0)
  exitcode  : -9 (pid: 23965)  (SIGKILL)
"""


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("", "exitcode  : -9 (pid: 23965)  (SIGKILL)"),
        ("error: CUDA out of memory\n", "error: CUDA out of memory"),
        ("[rank0]: x\nRuntimeError: Connection reset by peer\n", "RuntimeError: Connection reset by peer"),
    ],
)
def test_the_reason_is_that_of_the_process_and_not_the_exception_of_torchrun(printed, reason):
    assert reason_of(printed + SUMMARY) == reason
