"""Values as the agent of a W&B sweep writes them on a command line."""

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from flag_checks import explicit_flags, parse_flags
from flags import build_parser
from run.cli import Parser, PathsAction, UserError, number, run_command

# {flag: (its value in the YAML file, what main.py reads)}
VALUES = {
    "augmentation_methods": (["rotation", "shift"], ["rotation", "shift"]),
    "data_dirs": (["이마 주름", 'it\'s "here"', "None"], ["이마 주름", 'it\'s "here"', "None"]),
    "split": ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25]),
    "alpha": ([1, 2.0], [1, 2]),
    "batch_size": (32.0, 32),
    "seed": (1e3, 1000),
    "epochs": (7, 7),
    "learning_rate": (1e-05, 1e-5),
    "mixup": (1, 1.0),
    "tau": (0.0, 0.0),
    "train_loss": ("focal", "focal"),
    "wandb_name": ("two words, [1]", "two words, [1]"),
    "group_regex": (r"^(\d+)=[ab]", r"^(\d+)=[ab]"),
    "use_augmentation": (True, True),
    "no_cache": (True, True),
    "progressive": (False, False),
}
FORMS = ("args", "args_no_equals", "args_no_boolean_flags")


def agent_words(values, form):
    """The words that the client's agent makes of {flag: value} for `${form}`."""
    return create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VALUES)
def test_every_kind_of_value_is_read_as_it_is_in_the_yaml_file(name, form):
    value, expected = VALUES[name]
    args = build_parser().parse_args(agent_words({name: value}, form))
    assert getattr(args, name) == expected and type(getattr(args, name)) is type(expected)


@pytest.mark.parametrize("form", FORMS)
def test_all_values_of_a_trial_are_read_together(form):
    args = vars(build_parser().parse_args(agent_words({name: value for name, (value, _) in VALUES.items()}, form)))
    assert {name: args[name] for name in VALUES} == {name: expected for name, (_, expected) in VALUES.items()}


@pytest.mark.parametrize("form", FORMS)
def test_none_means_that_the_flag_is_not_given(form):
    names = [action.dest for action in build_parser()._actions if action.nargs != 0]
    words = agent_words(dict.fromkeys(names), form)
    assert explicit_flags(words) == {} and vars(build_parser().parse_args(words)) == vars(build_parser().parse_args([]))


def test_none_leaves_the_value_of_the_checkpoint(tmp_path):
    words = ["--data_dirs", str(tmp_path), "--target_samples_per_class=None", "--lr", "None"]
    inherited = {"target_samples_per_class": 50, "learning_rate": 0.5}
    args = parse_flags(words, inherited, checkpoint_is_known=True)
    assert args.target_samples_per_class == 50 and args.learning_rate == 0.5


@pytest.mark.parametrize("word", ["--epochs=2.5", "--epochs=nan", "--epochs=inf", "--epochs=", "--epochs=[2]"])
def test_a_whole_number_is_wanted(word):
    with pytest.raises(UserError, match="epochs"):
        build_parser().parse_args([word])


@pytest.mark.parametrize(
    "words, read",
    [
        (["--some", "[a", "b]"], ["[a", "b]"]),
        (["--some=[a]"], ["[a]"]),  # not a list as Python prints it
        (["--some=[]"], ["[]"]),
        (["--some", "None", "a"], ["None", "a"]),
        (["--some=['None']"], ["None"]),
    ],
)
def test_other_words_stay_as_they_are(words, read):
    parser = Parser("test", None)
    parser.add_argument("--some", nargs="+")
    parser.add_argument("--one", type=number(int))
    args, rest = parser.parse_known_args([*words, "--one=3.0", "--unknown=None", "--unknown", "['a']"])
    assert args.some == read and args.one == 3 and rest == ["--unknown=None", "--unknown", "['a']"]


@pytest.mark.parametrize(("platform", "is_expanded"), [("win32", True), ("linux", False)])
def test_patterns_of_paths_are_expanded_where_the_shell_does_not_do_it(platform, is_expanded, tmp_path, monkeypatch):
    for name in ("run_b", "run_a", "run_[1]", "other"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run.cli.sys.platform", platform)
    parser = Parser("test", None)
    parser.add_argument("paths", nargs="+", action=PathsAction)
    found = parser.parse_args(["other", "run_?", "run_[1]", "run_[*", "none_*"]).paths
    matches = ["run_a", "run_b"] if is_expanded else ["run_?"]
    assert found == ["other", *matches, "run_[1]", "run_[1]" if is_expanded else "run_[*", "none_*"]


@pytest.mark.parametrize("error", [UserError("--images: a\nerror: b.jpg"), OSError(2, "gone", "a\nerror: b.jpg")])
def test_an_error_is_one_line_whatever_the_names_of_files_are(error, capsys):
    def run(argv):
        raise error

    assert run_command(run, []) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "a\\nerror: b.jpg" in line
