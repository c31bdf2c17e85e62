"""The methods of an ablation, and shares of their epochs."""

import json

import pytest
from helpers import ROOT

from flag_checks import parse_flags, with_config
from flags import RECIPES
from run.cli import UserError
from study.grid import GRID, check_flags, common_flags, read_grid, varied_flags, with_epochs


def test_a_share_of_the_epochs_becomes_a_number():
    flags = "--train_loss ldam --drw_epoch 0.8E --wandb_name 0.8"
    assert with_epochs(flags, 30) == [*flags.replace("0.8E", "24").split(), "--epochs", "30"]
    for share, epochs in (("0.8E", 2), ("0.1E", 4)):  # all of the epochs, or none
        with pytest.raises(UserError, match=f"^{share}: .* of {epochs} epochs; increase --epochs$"):
            with_epochs(f"--drw_epoch {share}", epochs)


@pytest.mark.parametrize("path", [None, *sorted((ROOT / "grids").glob("*.yaml"))], ids=str)
def test_every_grid_of_the_project_has_flags_of_main(path):
    grid = read_grid(path)
    check_flags(["--data_dirs", str(ROOT)], grid, epochs=30)
    assert len(set(grid.values())) == len(grid) > 1


def test_a_config_cannot_set_what_the_methods_vary(tmp_path):
    trained = parse_flags(["--data_dirs", str(ROOT), "--use_augmentation", "--train_loss", "focal", "--beta", "0.9"])
    (tmp_path / "args.json").write_text(json.dumps(vars(trained)))
    common = common_flags(with_config(["--config", str(tmp_path / "args.json")], varied_flags(GRID)))
    plain, weighted = (parse_flags([*common, *with_epochs(GRID[name], 30)]) for name in ("cross entropy", "CB focal"))
    assert not plain.use_augmentation and plain.augment_all and plain.beta == weighted.beta == 0.9
    assert (plain.train_loss, weighted.train_loss) == ("ce", "cb")


@pytest.mark.parametrize("recipe", ["strong", "two_level"])
def test_methods_without_a_correction_get_none_of_a_recipe(recipe, tmp_path):
    with pytest.raises(UserError, match=r"^--recipe: sets flags in which the methods differ"):
        check_flags(["--data_dirs", str(ROOT), "--recipe", recipe], GRID, epochs=30)
    trained = parse_flags(["--data_dirs", str(ROOT), "--recipe", recipe])
    (tmp_path / "args.json").write_text(json.dumps(vars(trained)))
    common = common_flags(with_config(["--config", str(tmp_path / "args.json")], varied_flags(GRID)))
    plain = parse_flags([*common, *with_epochs(GRID["cross entropy"], 30)])
    assert (plain.train_loss, plain.sampling, plain.use_augmentation, plain.tau) == ("ce", "instance", False, 1.0)
    assert plain.ema == RECIPES[recipe].get("ema", 0)


def test_a_sampling_that_a_config_chooses_is_that_of_all_methods(tmp_path):
    (tmp_path / "base.yaml").write_text(f"data_dirs: [{ROOT}]\nsampling: sqrt\n")
    grid = {"CB": "--train_loss cb", "CE": "--train_loss ce"}
    common = common_flags(with_config(["--config", str(tmp_path / "base.yaml")], varied_flags(grid)))
    assert {parse_flags([*common, *with_epochs(flags, 30)]).sampling for flags in grid.values()} == {"sqrt"}


def test_recipes_can_be_compared_with_the_other_flags_of_a_config(tmp_path):
    grid = {"strong": "--recipe strong", "two level": "--recipe two_level"}
    trained = parse_flags(["--data_dirs", str(ROOT), "--seed", "7", "--dropout_prob", "0.1"])
    (tmp_path / "args.json").write_text(json.dumps(vars(trained)))
    common = common_flags(with_config(["--config", str(tmp_path / "args.json")], varied_flags(grid)))
    strong, two_level = (parse_flags([*common, *with_epochs(flags, 30)]) for flags in grid.values())
    assert (strong.train_loss, strong.sampling, strong.rotation) == ("logit_adjustment", "sqrt", 180)
    assert (two_level.train_loss, two_level.use_augmentation, two_level.rotation) == ("cb", True, 15)
    assert strong.dropout_prob == two_level.dropout_prob == 0.1


def test_the_default_methods_differ_in_what_they_claim():
    flags = {
        name: parse_flags([*common_flags(["--data_dirs", str(ROOT)]), *with_epochs(GRID[name], 30)]) for name in GRID
    }
    for name, args in flags.items():
        assert args.augment_all and args.wandb_mode == "disabled"
        assert args.use_augmentation == ("oversampling" in name or "augmented" in name)
        assert (args.train_loss == "cb") == (name in ("CB focal", "CB focal + oversampling"))


def test_methods_are_not_compared_with_batch_sizes_of_their_own():
    auto, common = "--batch_size auto", ["--data_dirs", str(ROOT)]
    with pytest.raises(UserError, match=r"^--batch_size: .* name a number instead of auto$"):
        check_flags([*common, *auto.split()], {"plain": ""}, epochs=3)
    with pytest.raises(UserError, match=r"^large: --batch_size"):
        check_flags(common, {"plain": "", "large": auto}, epochs=3)
