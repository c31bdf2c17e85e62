"""The same steps for every method, the settings of an ablation, and what happens to its runs."""

import json
from types import SimpleNamespace

import pytest
from helpers import TINY_FLAGS

import study.process
from run.cli import UserError
from run.files import read_json
from run.signals import Signals
from study.ablation import MethodRun, check_and_record_runs, plan_runs, train_runs

TINY = [*TINY_FLAGS[:5], "--lr", "1e-3"]


def plan(tmp_path, data_dir, grid, *flags, epochs=10):
    args = SimpleNamespace(epochs=epochs, seeds=[4, 5])
    return plan_runs(args, ["--data_dirs", str(data_dir), *TINY, *flags], grid, tmp_path)


def value(run, flag):
    return run.flags[len(run.flags) - run.flags[::-1].index(flag)]


def test_every_method_gets_the_same_steps_and_the_same_warm_up(tmp_path, data_dir):
    """22 training images are 3 batches of 8; oversampled to 3 x 12 they are 5."""
    grid = {
        "plain": "--train_loss ce",
        "oversampled": "--train_loss ce --use_augmentation",
        "deferred": "--train_loss ldam --drw_epoch 0.8E",
        "late": "--train_loss cb --use_augmentation --drw_epoch 0.5E",
        "larger batches": "--batch_size 16",
    }
    runs, num_images, table = plan(tmp_path, data_dir, grid)
    assert num_images == 35 and table is None
    assert [(run.method, run.seed) for run in runs] == [(name, seed) for seed in (4, 5) for name in grid]
    assert [value(run, "--epochs") for run in runs[:5]] == ["10", "6", "10", "8", "15"]  # 30, 30, 30, 32, 30 steps
    assert [value(run, "--warmup_epochs") for run in runs[:5]] == ["1", "0.6", "1", "1", "1.5"]  # 3 steps
    assert value(runs[2], "--drw_epoch") == "8" and value(runs[3], "--drw_epoch") == "4"
    assert value(runs[7], "--seed") == "5" and runs[7].folder.name == "deferred_seed5"


def test_an_ablation_continues_with_more_seeds_but_not_with_other_flags_or_images(tmp_path):
    path = tmp_path / "ablation.json"

    def check(num_images=35, gamma="2", seeds=(0,), table=None):
        runs = [MethodRun("a", seed, ["--gamma", gamma], tmp_path / f"a_seed{seed}") for seed in seeds]
        check_and_record_runs(path, runs, num_images, table)

    check()
    check(seeds=(1,))
    flags = {f"a_seed{seed}": ["--gamma", "2"] for seed in (0, 1)}
    assert read_json(path) == {"images": 35, "table": None, "flags": flags}
    with pytest.raises(UserError, match=r"was started with other settings \(table: None, now 1f\)"):
        check(table="1f")
    with pytest.raises(
        UserError, match=r"^--ablate_dir: .* was started with other settings \(number of images: 35, now 36"
    ):
        check(num_images=36)
    with pytest.raises(UserError, match=r"\(flags of a_seed1: --gamma 2, now --gamma 3\)"):
        check(gamma="3", seeds=(1,))
    path.write_text(json.dumps({"images": 35, "flags": flags}))  # of an older version
    check(table="1f")
    for content in ("[]", "{}", "{", '{"images": 35, "flags": 3}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"ablation\.json.* is damaged"):
            check()


def test_all_runs_are_trained_before_those_that_failed_are_reported(tmp_path, monkeypatch, capsys):
    """The program in the place of main.py fails with the seed 2."""
    program = tmp_path / "main.py"
    program.write_text(
        "import pathlib, sys\n"
        "seed, folder = (sys.argv[sys.argv.index(flag) + 1] for flag in ('--seed', '--run_dir'))\n"
        "folder = pathlib.Path(folder)\n"
        "if seed == '2': sys.exit('error: out of luck')\n"
        "folder.mkdir()\n"
        "(folder / 'history.csv').write_text('epoch,seconds\\n0,90\\n')\n"
        "[(folder / name).touch() for name in ('last_model.pth', 'best_model.pth', 'results.json')]\n"
    )
    monkeypatch.setattr(study.process, "MAIN", program)
    runs = [MethodRun("a", seed, ["--seed", str(seed)], tmp_path / f"a_seed{seed}") for seed in (0, 1, 2, 3)]
    runs[0].folder.mkdir()
    (runs[0].folder / "results.json").touch()
    with Signals() as signals, pytest.raises(UserError, match=r"^1 runs failed; a, seed 2: error: out of luck$"):
        train_runs(runs, 2, signals)
    assert not runs[0].folder.with_name("a_seed0.log").exists()  # it had its results
    assert {path.name for path in runs[3].folder.iterdir()} == {"history.csv", "best_model.pth", "results.json"}
    assert "a, seed 3: done, 1.5 min" in capsys.readouterr().out
