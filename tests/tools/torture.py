#!/usr/bin/env python3
"""Disturb real training runs in all the ways that happen on a shared server, and compare them with an undisturbed run.

python tests/tools/torture.py --rounds 100

Each round starts or resumes a run of the ResNet-50 on tiny images (`main.py --auto_resume --save_every 1`), disturbs it
once, and checks the files that are left. A run that has finished must equal the undisturbed run bit for bit. About half
of the runs have their folder on a small tmpfs, if one can be mounted (as root; otherwise try `unshare -rm`). The rounds
are recorded in FOLDER/rounds.jsonl; if the tool is interrupted, the same command resumes the count.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # sums must not depend on the number of threads
os.environ["WANDB_MODE"] = "disabled"  # else each run has its own W&B id
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import differences, write_class_folders  # noqa: E402

from resume import find_checkpoint  # noqa: E402
from run.cli import UserError  # noqa: E402
from run.saver import BEST, LAST, PREVIOUS  # noqa: E402

FLAGS = "--no-pretrained --image_size 32 --batch_size 8 --epochs 3 --use_augmentation --amp off --save_every 1"
TMPFS_BYTES = 1500 * 2**20  # four checkpoints of the ResNet-50, and some more
# main.py on a disk that needs 4 s to write a checkpoint: run/files.py writes in small chunks
SLOW_MAIN = """
import sys, time, run.files, run.machine, main
class Slow:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        for start in range(0, len(data), 4_000_000):
            self.file.write(data[start : start + 4_000_000])
            time.sleep(0.05)
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
run.files.open = lambda path, mode="r", **text: Slow(open(path, mode)) if mode == "wb" else open(path, mode, **text)
run.machine.keep_freed_memory()
sys.exit(main.main())
"""


class Lost(Exception):
    """A checkpoint was lost, a run differs from the undisturbed one, or an error was not reported as it should be."""


class Training:
    """One run in its folder, from start to finish in a series of processes."""

    def __init__(self, folder, data, generator):
        self.folder, self.data, self.generator = folder, data, generator
        self.progress = (-1, 0)  # the last epoch, and the images of the next one, that were found saved
        self.finished = False

    def start(self, slow=False):
        program = ["-c", SLOW_MAIN] if slow else [str(ROOT / "main.py")]
        flags = [*FLAGS.split(), "--auto_resume", "--data_dirs", str(self.data), "--run_dir", str(self.folder)]
        self.output, self.has_started = [], threading.Event()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen([sys.executable, *program, *flags], cwd=ROOT, start_new_session=True, **pipes)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.output.append(line)
            if "training on" in line:
                self.has_started.set()
        self.has_started.set()

    def wait_for_end(self, *allowed):
        """Wait for the process to end. -> its exit status, which must be 0 or in `allowed`."""
        status = self.process.wait(timeout=300)
        self.reader.join()
        output = "".join(self.output)
        # results.json is written last; a signal may come after it, and has its default effect while Python shuts down
        was_disturbed = status < 0 or status in allowed
        self.finished = status == 0 or (was_disturbed and (self.folder / "results.json").exists())
        if not self.finished and (status not in allowed or "Traceback" in output):
            raise Lost(f"exit status {status}: {''.join(self.output[-5:])}")
        return status

    def check(self, may_lose=False):
        """Check that a checkpoint can be read and, unless `may_lose`, is no older than at the last check."""
        if not self.folder.exists() or not list(self.folder.glob("*_model.pth")):
            if self.progress > (-1, 0):
                raise Lost("there is no checkpoint any more")
            return
        _, checkpoint = find_checkpoint(self.folder)
        position = checkpoint["position"]
        progress = checkpoint["epoch"], position["images"] if position else 0
        if not may_lose and progress < self.progress:
            raise Lost(f"the checkpoint went back from {self.progress} to {progress} (epoch, images)")
        self.progress = progress

    def wait_at_random(self):
        """Wait until a random moment during startup or training."""
        if self.generator.random() < 0.15:
            time.sleep(self.generator.uniform(0, 5))
        else:
            self.wait_during_training()

    def wait_during_training(self):
        self.has_started.wait(60)
        time.sleep(self.generator.uniform(0, 8))

    def wait_until_saving(self):
        """Wait until a checkpoint is being written, then for part of the time that takes."""
        self.has_started.wait(60)
        time.sleep(self.generator.uniform(0, 3))
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            if list(self.folder.glob(".*_model.pth.*.tmp")):
                time.sleep(self.generator.uniform(0, 1) ** 2)
                return
            time.sleep(0.002)

    def wait_until_saving_slowly(self):
        self.wait_until_saving()
        time.sleep(self.generator.uniform(0, 4))

    def signal_all(self, number):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


# The faults: each disturbs a Training once. Exit status -N: a signal arrived before main.py could handle it.


def start_and_signal(training, number, *allowed, wait=Training.wait_at_random, slow=False):
    """Start a process, send the signal when `wait` returns, and expect an exit status in `allowed`."""
    training.start(slow)
    wait(training)
    training.signal_all(number)
    training.wait_for_end(*allowed)


def killed(training):
    start_and_signal(training, signal.SIGKILL, -signal.SIGKILL)


def killed_while_saving(training):
    start_and_signal(training, signal.SIGKILL, -signal.SIGKILL, wait=Training.wait_until_saving)


def killed_while_saving_slowly(training):
    start_and_signal(training, signal.SIGKILL, -signal.SIGKILL, wait=Training.wait_until_saving_slowly, slow=True)


def terminated(training):
    start_and_signal(training, signal.SIGTERM, 143, -signal.SIGTERM)


def terminated_while_saving(training):
    start_and_signal(training, signal.SIGTERM, 143, wait=Training.wait_until_saving)


def terminated_while_saving_slowly(training):
    start_and_signal(training, signal.SIGTERM, 143, wait=Training.wait_until_saving, slow=True)


def interrupted(training):
    start_and_signal(training, signal.SIGINT, 130, wait=Training.wait_during_training)


def stopped_twice(training):
    training.start()
    training.wait_until_saving()
    training.signal_all(signal.SIGTERM)
    time.sleep(training.generator.choice([0, 1.2]))  # 0: a duplicate of the signal; 1.2: an impatient user
    training.signal_all(signal.SIGTERM)
    training.wait_for_end(143)


def asked_to_save(training):
    training.start()
    training.has_started.wait(60)
    for _ in range(5):
        time.sleep(training.generator.uniform(0, 1))
        training.signal_all(signal.SIGUSR1)
    training.signal_all(signal.SIGTERM)
    training.wait_for_end(143)


def disk_full(training):
    """Fill the disk for a few seconds: training continues, and is an error only if it finishes in that time."""
    training.start()
    training.wait_at_random()
    filler = training.folder.parent / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    time.sleep(training.generator.uniform(1, 8))
    if training.generator.random() < 0.5:
        training.signal_all(training.generator.choice([signal.SIGKILL, signal.SIGTERM]))
        time.sleep(2)
    filler.unlink()
    time.sleep(2)
    training.signal_all(signal.SIGTERM)
    training.wait_for_end(143, -signal.SIGKILL, -signal.SIGTERM, 2)


def damage(training, name, kind):
    path = training.folder / name
    content = path.read_bytes()
    path.unlink()  # other names may be hard links to it
    if kind == "truncate":
        content = content[: training.generator.randrange(len(content))]
    else:
        content = bytearray(content)
        for _ in range(training.generator.choice([1, 1, 100])):
            content[training.generator.randrange(len(content))] ^= 1 << training.generator.randrange(8)
    path.write_bytes(content)


def last_model_cut_short(training):
    damage(training, LAST, "truncate")
    training.check(may_lose=True)
    terminated(training)


def bits_of_the_last_model_flipped(training):
    damage(training, LAST, "flip")
    training.check(may_lose=True)
    terminated(training)


def other_files_damaged(training):
    last_is_intact = find_checkpoint(training.folder)[0].name == LAST  # an earlier fault may have damaged it
    for name in [PREVIOUS] * last_is_intact + ["history.csv", "splits.json", "args.json"]:
        damage(training, name, training.generator.choice(["truncate", "flip"]))
    (training.folder / f".{LAST}.1.tmp").write_bytes(b"half")
    terminated(training)


def nothing_readable(training):
    """Damage both checkpoints: main.py must refuse to start, and resume once they are restored."""
    copies = {name: training.folder / f"copy_of_{name}.bytes" for name in (LAST, PREVIOUS)}
    for name, copy in copies.items():
        shutil.copy(training.folder / name, copy)
        damage(training, name, "truncate")
    training.start()
    if training.wait_for_end(2) != 2 or "to start over" not in "".join(training.output):
        raise Lost(f"damaged checkpoints were not refused: {''.join(training.output)}")
    for name, copy in copies.items():
        os.replace(copy, training.folder / name)
    terminated(training)


def best_model_damaged(training):
    """Damage the best model: main.py must name it and refuse to start, or restore it from the last model."""
    copy = training.folder / "copy.bytes"
    shutil.copy(training.folder / BEST, copy)
    damage(training, BEST, "truncate")
    training.start()
    training.has_started.wait(60)
    training.signal_all(signal.SIGTERM)
    if training.wait_for_end(2, 143) == 2:
        if BEST not in training.output[-1]:
            raise Lost(f"the error does not name {BEST}: {training.output[-1]}")
        os.replace(copy, training.folder / BEST)
    copy.unlink(missing_ok=True)


def two_at_once(training):
    training.start()
    training.has_started.wait(60)
    first, output = training.process, training.output
    if first.poll() is None:
        second = Training(training.folder, training.data, training.generator)
        second.start()
        second.wait_for_end(2)
        if first.poll() is None and f"process {first.pid} on" not in "".join(second.output):
            raise Lost(f"a second process was not refused: {''.join(second.output)}")
    training.process, training.output = first, output
    training.signal_all(signal.SIGTERM)
    training.wait_for_end(143)


# {fault: the file it needs}
DAMAGES = {
    last_model_cut_short: PREVIOUS, bits_of_the_last_model_flipped: PREVIOUS, other_files_damaged: PREVIOUS,
    nothing_readable: PREVIOUS, best_model_damaged: BEST,
}  # fmt: skip
FAULTS = [
    killed, killed, killed_while_saving, killed_while_saving, killed_while_saving, killed_while_saving_slowly,
    killed_while_saving_slowly, terminated_while_saving_slowly, terminated, terminated_while_saving, interrupted,
    stopped_twice, asked_to_save, two_at_once, *DAMAGES,
]  # fmt: skip


def mount_tmpfs(folder):
    """Mount a small, empty tmpfs at `folder`. -> whether that worked"""
    folder.mkdir(exist_ok=True)
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def disturb_one_run(folder, data, undisturbed, generator, rounds_left, record, selected):
    """Disturb a run until it finishes.

    undisturbed: folder of the undisturbed run. record: called after each round with (fault, what was lost or None,
    whether the run has finished). selected: names of the faults to use, or None for all.
    """
    on_tmpfs = generator.random() < 0.5 and mount_tmpfs(folder / "small")
    parent = folder / ("small" if on_tmpfs else "disk")
    shutil.rmtree(parent / "run", ignore_errors=True)
    training = Training(parent / "run", data, generator)
    faults = FAULTS + [disk_full] * 6 * on_tmpfs
    try:
        while not training.finished and rounds_left > 0:
            possible = [fault for fault in faults if (training.folder / DAMAGES.get(fault, "")).exists()]
            possible = [fault for fault in possible if not selected or fault.__name__ in selected]
            fault, lost = generator.choice(possible or [killed, terminated]), None
            try:
                fault(training)
                if not training.finished:
                    training.check()
                elif different := differences(undisturbed, training.folder):
                    raise Lost(f"differs from the undisturbed run: {', '.join(different)}")
            except (Lost, UserError, subprocess.TimeoutExpired) as error:
                lost = f"{type(error).__name__}: {error}"
                training.signal_all(signal.SIGKILL)
            record(fault.__name__, lost, training.finished)
            rounds_left -= 1
            if lost:
                kept = shutil.copytree(training.folder, folder / f"lost_{time.time():.0f}")
                print(f"    run folder copied to {kept}")
                return
        if not training.finished:  # after the last round, let the run finish
            training.start()
            training.wait_for_end()
            if different := differences(undisturbed, training.folder):
                record("undisturbed end", f"differs from the undisturbed run: {', '.join(different)}", True)
    finally:
        shutil.rmtree(training.folder, ignore_errors=True)
        if on_tmpfs:
            subprocess.run(["umount", str(folder / "small")], check=True)


def read_rounds(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("torture"), help="working folder, needs 3 GB [torture]")
    names = sorted({fault.__name__ for fault in [*FAULTS, disk_full]})
    parser.add_argument(
        "--faults", nargs="+", choices=names, metavar="NAME", help=f"use only these faults, of {', '.join(names)}"
    )
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "rounds.jsonl"
    data = folder / "images"
    if not data.exists():
        write_class_folders(data)
    undisturbed = Training(folder / "whole", data, random.Random(0))
    undisturbed.start()  # if it has finished before, main.py says so and ends
    undisturbed.wait_for_end()

    def record(fault, lost, finished):
        entry = {"round": len(read_rounds(log)) + 1, "fault": fault, "finished": finished, "lost": lost}
        print(entry, flush=True)
        with open(log, "a") as file:
            file.write(json.dumps(entry) + "\n")

    while (done := len(read_rounds(log))) < args.rounds:
        disturb_one_run(folder, data, undisturbed.folder, random.Random(done), args.rounds - done, record, args.faults)
    rounds = read_rounds(log)
    print(f"\n{len(rounds)} rounds, {sum(entry['finished'] for entry in rounds)} runs finished")
    for fault, count in sorted(Counter(entry["fault"] for entry in rounds).items(), key=lambda item: -item[1]):
        print(f"{count:5d} {fault.replace('_', ' ')}")
    losses = [entry for entry in rounds if entry["lost"]]
    print(f"losses: {len(losses)}")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
