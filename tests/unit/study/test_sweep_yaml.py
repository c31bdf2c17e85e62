"""The distributions of a sweep, which are those of W&B, and what is read from its YAML."""

import math

import numpy as np
import optuna
import pytest
import yaml
from helpers import ROOT
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from flags import build_parser
from run.cli import UserError
from study.sweep_yaml import Parameter, read_sweep


def draws(spec, count=4000):
    """Values of a parameter, drawn by Optuna's random sampler."""
    parameter = Parameter("p", spec)
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler)
    trial = optuna.trial.FixedTrial({})
    drawn = (sampler.sample_independent(study, trial, "p", parameter.distribution) for _ in range(count))
    return [parameter.value(value) for value in drawn]


# {distribution: (keys, transform after which values are uniform between low and high, low, high)}
UNIFORM = {
    "uniform": ({"min": 2.0, "max": 4.0}, float, 2, 4),
    "log_uniform": ({"min": -3, "max": 1}, math.log, -3, 1),
    "log_uniform_values": ({"min": 1e-5, "max": "1e-1"}, math.log10, -5, -1),  # YAML reads 1e-1 as a string
    "inv_log_uniform": ({"min": -3, "max": 1}, lambda x: math.log(1 / x), -3, 1),
    "inv_log_uniform_values": ({"min": 1e-3, "max": 1e2}, math.log10, -3, 2),
}


@pytest.mark.parametrize("kind", UNIFORM)
def test_continuous_distributions_are_those_of_wandb(kind):
    spec, transform, low, high = UNIFORM[kind]
    values = np.sort([transform(value) for value in draws({"distribution": kind, **spec})])
    uniform = np.linspace(low, high, len(values))
    assert np.abs(values - uniform).max() < 0.05 * (high - low)


@pytest.mark.parametrize("kind, transform", [("normal", float), ("log_normal", math.log)])
def test_normal_distributions_have_mean_mu_and_deviation_sigma(kind, transform):
    values = [transform(value) for value in draws({"distribution": kind, "mu": 3, "sigma": 0.5})]
    assert np.mean(values) == pytest.approx(3, abs=0.05) and np.std(values) == pytest.approx(0.5, rel=0.05)
    assert np.mean(np.abs(np.array(values) - 3) < 0.5) == pytest.approx(0.683, abs=0.03)


ROUNDED = {
    "q_uniform": ({"min": 0.1, "max": 0.5, "q": 0.1}, {0.1, 0.2, 0.3, 0.4, 0.5}),
    "q_log_uniform": ({"min": 0, "max": 2, "q": 2}, {0, 2, 4, 6, 8}),
    "q_log_uniform_values": ({"min": 1, "max": 8, "q": 2}, {0, 2, 4, 6, 8}),
    "q_normal": ({"mu": 0, "sigma": 0.3, "q": 1}, {-1, 0, 1}),
    "q_log_normal": ({"mu": 0, "sigma": 0.3, "q": 1}, {0, 1, 2, 3}),
    "int_uniform": ({"min": 3, "max": 6}, {3, 4, 5, 6}),
    "categorical": ({"values": [0.5, "two", True]}, {0.5, "two", True}),
}


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_and_discrete_distributions_draw_multiples_and_choices(kind):
    spec, expected = ROUNDED[kind]
    assert set(draws({"distribution": kind, **spec})) <= expected
    assert len(set(draws({"distribution": kind, **spec}))) >= min(3, len(expected))


def test_choices_are_drawn_with_their_probabilities():
    values = draws({"values": ["a", "b", "c"], "probabilities": [0.7, 0.3, 0.0]})
    assert values.count("a") / len(values) == pytest.approx(0.7, abs=0.03) and "c" not in values


def test_a_distribution_that_is_not_named_is_chosen_as_in_wandb():
    assert Parameter("p", {"min": 1, "max": 3}).kind == "int_uniform"
    assert Parameter("p", {"min": 1, "max": 3.5}).kind == "uniform"
    assert Parameter("p", {"value": 3}).distribution is None and Parameter("p", {"value": 3}).value(None) == 3
    lists = Parameter("p", {"values": [["rotation", "scale"], ["shear"]]})
    assert lists.value(lists.distribution.choices[0]) == ["rotation", "scale"]


def test_the_sweep_of_the_project_is_read():
    known = {option[2:] for action in build_parser()._actions for option in action.option_strings}
    config = read_sweep(ROOT / "sweep.yaml", known)
    assert set(config.searched()) == {"learning_rate", "gamma", "dropout_prob", "beta"}
    assert isinstance(config.sampler(0), optuna.samplers.TPESampler) and config.maximizes
    assert isinstance(config.pruner(30), optuna.pruners.HyperbandPruner)
    flags = config.flags({"learning_rate": 0.1, "use_augmentation": True})
    assert flags == ["--data_dirs", "data", "--learning_rate=0.1", "--use_augmentation=True"]


@pytest.mark.parametrize("macro", ["args", "args_no_equals", "args_no_boolean_flags"])
def test_main_reads_the_same_from_a_search_as_from_the_agent_of_a_sweep(tmp_path, macro):
    parameters = {
        "augmentation_methods": {"values": [["rotation", "shift"], ["shear"]]},
        "target_samples_per_class": {"values": [None, 50]},
        "weights": {"value": None},
        "batch_size": {"value": 32.0},
        "epochs": {"values": [8.0, 4.0]},
        "wandb_name": {"value": "두 단어"},
        "use_augmentation": {"values": [True, False]},
        "pretrained": {"value": False},
    }
    content = {
        "method": "grid",
        "metric": {"name": "val_loss"},
        "parameters": parameters,
        "command": ["${env}", "python", "${program}", "--data_dirs", "data", f"${{{macro}}}"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    config, parser = read_sweep(tmp_path / "sweep.yaml", parameters), build_parser()
    assert config.highest("epochs", 100) == 8 and config.highest("seed", 3) == 3 and len(config.grid()) == 16
    for point in config.grid():
        values = {p.name: p.value(point.get(p.name)) for p in config.parameters}
        agent = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
        words = config.flags(values)
        assert vars(parser.parse_args(words)) == vars(parser.parse_args(["--data_dirs", "data", *agent[macro]]))


def test_what_is_not_a_sweep_is_refused_with_the_name_of_the_file(tmp_path):
    for content in ("a: [", "- 1", "", "method: grid\nmethod: bayes"):
        (tmp_path / "s.yaml").write_text(content)
        with pytest.raises(UserError, match=r"s\.yaml"):
            read_sweep(tmp_path / "s.yaml", {"gamma"})
    with pytest.raises(UserError, match=r"gone\.yaml cannot be read"):
        read_sweep(tmp_path / "gone.yaml", {"gamma"})
