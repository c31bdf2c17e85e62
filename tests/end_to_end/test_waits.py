"""No wait without end: a signal ends the wait for a batch, and workers end where their work is done."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from helpers import PATIENCE, ROOT, THIN_MAIN, TINY_FLAGS, differences, run_main, wait_for

from run.files import read_rows

linux = pytest.mark.skipif(sys.platform != "linux", reason="worker processes and shared memory of Linux")
FLAGS = [*TINY_FLAGS, "--amp", "off", "--use_augmentation", "--num_workers", "2"]


def stop_workers_then_this_process(history):
    """Stop the workers as if their disk did not answer any more, as soon as an epoch is saved, then send SIGTERM."""
    wait_for(lambda: history.exists() and len(read_rows(history)) > 0)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()


@linux
@pytest.mark.usefixtures("thin_network")
def test_a_run_whose_batch_never_arrives_saves_and_stops_at_a_signal(data_dir, tmp_path, capfd):
    flags = ["--data_dirs", data_dir, *FLAGS, "--epochs", "4"]
    assert run_main(*flags, "--run_dir", tmp_path / "undisturbed") == 0
    stopped = tmp_path / "stopped"
    thread = threading.Thread(target=stop_workers_then_this_process, args=[stopped / "history.csv"])
    thread.start()
    assert run_main(*flags, "--run_dir", stopped) == 143
    thread.join()
    assert not multiprocessing.active_children()
    out, err = capfd.readouterr()
    assert "stopped; resume with: python main.py --resume" in err and "Traceback" not in out + err
    assert run_main(*flags, "--run_dir", stopped, "--auto_resume") == 0
    assert differences(tmp_path / "undisturbed", stopped) == []


@linux
def test_no_worker_is_left_and_nothing_is_printed_after_the_results(data_dir, tmp_path):
    command = [sys.executable, THIN_MAIN, "--data_dirs", data_dir, *FLAGS, "--run_dir", tmp_path / "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        for line in process.stdout:
            if line.startswith("results saved to"):
                break
        rest, _ = process.communicate(timeout=9)  # torch's own wait is 5 s per worker, and there are two
    assert (process.returncode, rest) == (0, "")


@linux
def test_a_run_with_too_little_shared_memory_uses_fewer_workers(data_dir, tmp_path):
    """As in a container with a small /dev/shm; and if it is filled later, the run ends with one line."""
    script = f"""
mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 99
cd {ROOT}
{sys.executable} {THIN_MAIN} "$@" --run_dir {tmp_path / "fewer"} || exit
{sys.executable} - "$@" --run_dir {tmp_path / "lost"} <<'END'
import sys
sys.path.insert(0, "tests/tools")
import main, resnet_custom, run.workers, thin_main
resnet_custom.resnet50 = thin_main.thin_resnet50
run.workers.free_shared_memory = lambda: 2**30
sys.exit(main.main())
END
"""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the permission to mount a file system")
    command = ["unshare", "-m", "bash", "-c", script, "bash", "--data_dirs", data_dir, *FLAGS, "--image_size", "64"]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE)
    if process.returncode == 99:
        pytest.skip("needs the permission to mount a file system")
    lines = [line for line in process.stdout.splitlines() if "/dev/shm has 0.1 MB free" in line]
    assert len(lines) == 1 and (tmp_path / "fewer" / "results.json").exists()
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("error: --num_workers: the batches of the loader workers do not fit into /dev/shm")
