"""The search for the largest batch. Only the memory is not real: above some size, a forward pass says it is full."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY_FLAGS, differences, run_main

import batch_search
from batch_search import batch_limit, largest_batch, resolve_batch_size
from flag_checks import parse_flags
from flags import build_parser
from model import Model, load_checkpoint
from run import ranks
from run.cli import UserError
from run.files import read_json, write_json
from run.machine import OUT_OF_MEMORY, random_state
from run.saver import LAST
from study.folds import run_folds
from utils import CrossEntropy

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


@pytest.fixture
def memory(thin_network, monkeypatch):
    """Have room for so many images in a forward pass. -> function of (in training, in evaluation, error)"""
    sizes = {True: [], False: []}  # of the batches so far; True: in training

    def limit(training, evaluation, error=FULL):
        forward = Model.forward

        def limited(model, images):
            sizes[model.training].append(len(images))
            if len(images) > (training if model.training else evaluation):
                raise type(error)(*error.args)  # a new one, as the traceback of an error keeps what it refers to
            return forward(model, images)

        monkeypatch.setattr(Model, "forward", limited)
        return sizes

    return limit


def search(*flags, limit=64):
    args = build_parser().parse_args(["--image_size", "32", "--amp", "off", "--batch_size", "auto", *flags])
    return largest_batch(args, CPU, CrossEntropy(), 3, limit)


def test_a_small_data_set_keeps_its_steps_but_never_has_batches_below_the_default():
    assert batch_limit(10**6, 1) == 1024
    assert batch_limit(12_800, 1) == 256 and batch_limit(12_800, 4) == 64
    assert batch_limit(100, 1) == batch_limit(1000, 4) == 32


def test_ranks_share_the_limit_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(batch_search, "SEARCHED", ("cpu",))
    four_ranks = SimpleNamespace(size=4, rank=0, gather=lambda value: [value, value, 16, value])
    monkeypatch.setattr(ranks, "_group", four_ranks)
    monkeypatch.setattr(batch_search, "largest_batch", lambda *arguments: limits.append(arguments[-1]) or 32)
    args, limits = build_parser().parse_args(["--batch_size", "auto"]), []
    resolve_batch_size(args, CPU, CrossEntropy(), [6_400] * 2)
    assert limits == [64]  # of the 256 images that leave an epoch its steps
    assert args.batch_size == 4 * 16  # the rank with the least memory decides


@pytest.mark.parametrize(
    ("training", "evaluation", "found"),
    [(8, 10**6, 8), (31, 10**6, 16), (10**6, 32, 16), (10**6, 63, 16), (10**6, 10**6, 64)],
)
def test_both_training_and_an_evaluation_of_twice_as_many_images_fit(memory, training, evaluation, found):
    sizes = memory(training, evaluation)
    assert search() == found
    assert max(sizes[True]) <= 64 and max(sizes[False]) <= 128  # nothing above the limit is tried


def test_what_is_tried_are_the_steps_of_the_flags(memory, monkeypatch):
    """Two steps per size, of as many batches as are accumulated, with the average, and never compiled."""
    sizes, engines, build_engine = memory(16, 10**6), [], batch_search.build_engine
    monkeypatch.setattr(batch_search, "build_engine", lambda *args: engines.append(build_engine(*args)) or engines[-1])
    flags = "--grad_accum 4 --ema 0.9 --mixup 0.2 --cutmix 1 --clip_grad 0.5 --progressive --crt_epochs 1 --compile"
    assert search(*flags.split(), "--amp", "bf16", "--train_loss", "ldam", "--learning_rate", "1e6") == 16
    (engine,) = engines
    assert sizes[True] == [4] * 4 + [8] * 4 + [16] * 4 + [32] and sizes[False] == [8, 16, 32]
    assert engine.average.steps == engine.scheduler.last_epoch == 6 and engine.compiled_batch == 0
    assert engine.amp_dtype is torch.bfloat16 and engine.mixer and engine.clip_grad == 0.5
    state = engine.optimizer.state[engine.model.head.weight]
    assert state["exp_avg"].abs().sum() > 0 and state["step"] == 6


@pytest.mark.parametrize("words", OUT_OF_MEMORY)
def test_full_memory_is_recognized_in_whatever_words(memory, words):
    memory(8, 10**6, RuntimeError(f"CUDA error: {words}\nsome advice"))
    assert search() == 8


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("a mistake"), UserError("broken")])
def test_any_other_error_is_not_taken_for_full_memory(memory, error):
    memory(8, 10**6, error)
    with pytest.raises(type(error), match=str(error)):
        search()


def test_images_of_which_no_batch_fits_are_one_line_that_says_what_to_do(memory):
    memory(3, 10**6)
    with pytest.raises(UserError, match=r"^--batch_size auto: not even 4 images .* reduce --image_size") as caught:
        search()
    assert "Tried to allocate 2.00 GiB" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fits", [True, False])
def test_nothing_is_left_of_what_was_tried(memory, monkeypatch, fits):
    """Neither memory, when cached blocks are freed, nor a changed random state."""
    memory(10**6 if fits else 8, 10**6)
    limited, tensors, alive = Model.forward, [], []

    def observed(model, images):
        tensors.extend((weakref.ref(model.head.weight), weakref.ref(images)))
        return limited(model, images)

    monkeypatch.setattr(Model, "forward", observed)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(t() is not None for t in tensors)))
    torch.manual_seed(7)
    before = random_state(CPU)
    search("--mixup", "0.2", limit=16)
    assert torch.equal(random_state(CPU)["cpu"], before["cpu"])
    assert alive[-1] == 0 and len(alive) == (1 if fits else 2)
    if not fits:  # after the failure, only the weights of the engine are there
        assert alive[0] == len(tensors) / 2


@pytest.mark.parametrize(("peak", "leaves"), [(71, True), (73, False)])
def test_a_tenth_of_the_memory_that_others_leave_stays_free(monkeypatch, peak, leaves):
    """Of 100 GB, another process has 20 GB. Torch has taken 75 GB, not all of which was ever in use."""
    for name, value in {"mem_get_info": (5, 100), "memory_reserved": 75, "max_memory_allocated": peak}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert batch_search._leaves_headroom(torch.device("cuda")) == leaves


@pytest.mark.parametrize(
    ("training", "counts", "flags", "line"),
    [
        (16, [9000, 3000], [], "16 images (32 do not fit), learning rate 0.0001 x sqrt(16 / 32) = 7.07e-05"),
        (10**6, [3000, 200], ["--lr", "0.002"],
         "64 images (128 leave fewer than 50 steps per epoch), learning rate 0.002 x sqrt(64 / 32) = 0.00283"),
        (10**6, [10**6, 1], [], "64 images (more are not tried), learning rate 0.0001 x sqrt(64 / 32) = 0.000141"),
    ],
)  # fmt: skip
def test_one_line_says_what_was_found_and_why_not_more(memory, monkeypatch, capsys, training, counts, flags, line):
    monkeypatch.setattr(batch_search, "SEARCHED", ("cpu",))
    if counts[0] == 10**6:
        monkeypatch.setattr(batch_search, "LARGEST", 64)
    memory(training, 10**6)
    args = build_parser().parse_args(["--image_size", "32", "--amp", "off", "--batch_size", "auto", *flags])
    resolve_batch_size(args, CPU, CrossEntropy(), np.array(counts))
    assert capsys.readouterr().out == f"--batch_size auto: {line}\n"
    assert type(args.batch_size) is int and type(args.learning_rate) is float  # as a checkpoint holds them


def test_on_a_cpu_it_is_the_default_and_a_line_says_so(capsys):
    args = build_parser().parse_args(["--batch_size", "auto"])
    resolve_batch_size(args, CPU, CrossEntropy(), [5, 5])
    assert args == build_parser().parse_args([])
    assert "32 images (there is nothing to search on cpu" in capsys.readouterr().out
    resolve_batch_size(args, CPU, CrossEntropy(), [5, 5])
    assert not capsys.readouterr().out


def test_a_run_is_the_one_that_was_started_with_the_numbers(memory, monkeypatch, data_dir, tmp_path, capsys):
    """Bit for bit; and resumed with the command that it was started with, it neither searches nor scales again."""
    monkeypatch.setattr(batch_search, "SEARCHED", ("cpu",))
    memory(8, 10**6)
    flags = ["--data_dirs", data_dir, *TINY_FLAGS, "--epochs", 1, "--amp", "off", "--mixup", 0.2, "--ema", 0.9]
    auto = [*flags, "--batch_size", "auto", "--run_dir", tmp_path / "auto", "--auto_resume"]
    assert run_main(*auto) == 0
    found = {"batch_size": 8, "learning_rate": 1e-3 / 2}  # TINY_FLAGS have 1e-3
    by_hand = [word for name, value in found.items() for word in (f"--{name}", value)]
    assert run_main(*flags, *by_hand, "--run_dir", tmp_path / "by_hand") == 0
    assert differences(tmp_path / "auto", tmp_path / "by_hand") == []
    args, expected = (read_json(tmp_path / name / "args.json") for name in ("auto", "by_hand"))
    assert {name for name in args if args[name] != expected[name]} == {"run_dir", "auto_resume"}

    monkeypatch.delattr(batch_search, "largest_batch")
    capsys.readouterr()
    assert run_main(*auto, "--epochs", 2) == 0
    assert "--batch_size auto: 8 images, as in the checkpoint\n" in capsys.readouterr().out
    assert found.items() <= load_checkpoint(tmp_path / "auto" / LAST)["args"].items()


def test_all_folds_have_the_numbers_that_the_first_one_finds(data_dir, tmp_path):
    command = ["--data_dirs", str(data_dir), "--folds", "3", "--batch_size", "auto", "--run_dir", str(tmp_path / "cv")]
    folds = []

    def train_fold(argv, resume_hint):
        args = parse_flags(argv)
        folds.append((args.batch_size, args.learning_rate))
        Path(args.run_dir).mkdir()
        write_json(Path(args.run_dir, "args.json"), {"batch_size": 64, "learning_rate": 1e-4 * 2**0.5})
        return 0 if args.fold < 2 else 2

    assert run_folds(parse_flags(command), command, train_fold) == 2
    assert folds == [("auto", 1e-4)] + [(64, 1e-4 * 2**0.5)] * 2
