"""How a command line of `main.py` is parsed, and which flags exclude each other."""

import argparse
import os
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from data_flags import COLUMN_FLAGS, FOLDER_FLAGS, PATH_FLAGS
from flag_queries import corrects_by_loss, corrects_by_sampling, flag_of, scaled_learning_rate
from flags import (
    CORRECTION,
    DEMO_DEFAULTS,
    FROM_SCRATCH,
    NOT_INHERITED,
    RECIPES,
    SPLITS,
    WEIGHTED_LOSSES,
    WHOLE_CORRECTION,
    build_parser,
)  # fmt: skip
from images.layout import SPLIT_NAMES, take_splits
from run.cli import Parser, UserError
from run.folder import check_is_file, check_is_folder, prefixed
from run.ranks import num_ranks


def parse_flags(
    argv: Sequence[str], inherited: Mapping[str, Any] | None = None, *, checkpoint_is_known: bool = False
) -> argparse.Namespace:
    """Parse and check a command line of main.py. -> its flags, folders as absolute paths

    inherited: {flag: value} of the checkpoint that is resumed: the defaults of the flags that are not given.
    checkpoint_is_known: False before the checkpoint of `--resume` or `--auto_resume` is read: then only flags that are
    given explicitly are checked against each other. Raises UserError.
    """
    argv = with_config(argv)
    explicit = explicit_flags(argv)
    parser = build_parser()
    recipe = recipe_flags(explicit, argv)
    demo = _fitting_defaults(_demo_defaults(explicit), explicit, argv, recipe) if explicit.get("demo") else {}
    parser.set_defaults(**(inherited or {**demo, **recipe}))
    args = parser.parse_args(argv)
    if inherited and args.batch_size == "auto":  # was found when the run was started
        args.batch_size = parser.get_default("batch_size")
        if "learning_rate" in explicit:
            args.learning_rate = scaled_learning_rate(args.learning_rate, args.batch_size)
    if "output_dir" in explicit and os.path.isdir(args.output_dir):
        args.output_dir = os.path.join(args.output_dir, "")  # with a slash: run folders are inside it
    if {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys() and not (args.run_dir or args.resume):
        # a trial of a sweep: its own folder, in which it resumes when it is restarted after preemption
        args.run_dir, args.auto_resume = prefixed(args.output_dir, os.environ["WANDB_RUN_ID"]), True
    if inherited and args.eval_only:
        _forget_table(args, explicit)
    for name in PATH_FLAGS:
        if getattr(args, name):
            setattr(args, name, [os.path.abspath(path) for path in getattr(args, name)])
    args.cache_dir = args.cache_dir and os.path.abspath(args.cache_dir)
    if inherited and args.auto_resume:
        args.demo = False  # its images exist already and are the --data_dirs of the run
    may_have_checkpoint = args.resume or (args.auto_resume and os.path.isdir(args.run_dir or ""))
    is_complete = checkpoint_is_known or not may_have_checkpoint
    if is_complete and not args.labels:  # which say what is in which split
        take_splits(args, explicit, inherited or {})
    for names, is_broken, message in RULES:
        if (is_complete or explicit.keys() >= set(names)) and is_broken(args):
            raise UserError(message.format(**vars(args)))
    is_new_folder = args.run_dir and not args.auto_resume and (args.eval_only or not args.resume)
    if is_new_folder and not checkpoint_is_known and os.path.lexists(args.run_dir):
        or_resume = "" if args.check_data else " or add --auto_resume"
        raise UserError(f"--run_dir: {args.run_dir} already exists; name a new folder{or_resume}")
    if is_complete:
        _check_shares(args)
        if args.batch_size != "auto" and args.batch_size % num_ranks():
            raise UserError(f"--batch_size: {args.batch_size} images cannot be divided among {num_ranks()} processes")
        if not inherited:
            _check_folders(args)
    return args


def with_config(argv: Sequence[str], ignored: Collection[str] = ()) -> list[str]:
    """-> a command line with the flags of the file of `--config` in front of its own, which win, as do those of its
    own `--recipe`.

    ignored: flags that are passed over in the file, besides NOT_INHERITED; with a recipe, also its correction of
    imbalance. Raises UserError, naming the file.
    """
    finder = Parser("main.py", None, add_help=False)
    finder.add_argument("--config")
    found, words = finder.parse_known_args(argv)
    if found.config is None:
        return words
    from run.files import read_yaml

    content, parser, config_words = read_yaml(found.config, "--config"), build_parser(), {}
    if not isinstance(content, Mapping):
        raise UserError(f"--config: {found.config}: expected a mapping of flags to values")
    if "recipe" in ignored and content.get("recipe"):
        ignored = {*ignored, *WHOLE_CORRECTION}
    for name, value in content.items():
        try:
            flag_words = _words_of(parser, str(name), value)
            parser.parse_args(flag_words)
        except UserError as error:
            raise UserError(f"--config: {found.config}: {error}") from error
        if flag_of(str(name)) not in (*NOT_INHERITED, *ignored):
            config_words.setdefault(flag_of(str(name)), []).extend(flag_words)
    return [*_joined(config_words, _replaced(config_words, words) | _other_splits(config_words, words)), *words]


def _replaced(config_words, words):
    """The flags of a file that give way to `--recipe` of a command line: those of that recipe, what excludes them, the
    correction of imbalance, and what the file has by a recipe of its own."""
    if "recipe" not in explicit_flags(words):
        return set()
    start = [word for name in ("pretrained", "weights") for word in config_words.get(name, [])]
    recipe = recipe_flags(explicit_flags([*start, *words]), [*start, *words])
    in_file = explicit_flags(_joined(config_words, ()))
    previous = RECIPES.get(in_file.get("recipe"), {}) | FROM_SCRATCH.get(in_file.get("recipe"), {})
    replaced = {*recipe, *WHOLE_CORRECTION, *(name for name in previous if in_file.get(name) == previous[name])}
    broken = _names_of_broken_rules(recipe, [*_joined(config_words, replaced), *words])
    return replaced | {name for names in broken if recipe.keys() & set(names) for name in names}


def _other_splits(config_words, words):
    """`val_dirs` and `test_dirs` of a file that are the D/val and D/test of its `--data_dirs D`: they give way to other
    `--data_dirs` of the command line."""
    in_file, given = explicit_flags(_joined(config_words, ())), explicit_flags(words)

    def folders(flags, name):
        return [os.path.abspath(folder) for folder in flags.get(name, [])]

    former = folders(in_file, "data_dirs")
    if "data_dirs" not in given or folders(given, "data_dirs") == former:
        return set()
    parents = set(map(os.path.dirname, former))

    def is_split(folder):
        return os.path.dirname(folder) in parents and os.path.basename(folder).casefold() in SPLIT_NAMES

    return {
        name for name in ("val_dirs", "test_dirs") if name in in_file and all(map(is_split, folders(in_file, name)))
    }


def _joined(words_of, left_out):
    return [word for name, words in words_of.items() if name not in left_out for word in words]


def _words_of(parser, name, value):
    """-> a flag of a file and its value as words of a command line; none if it is null or the default prefix."""
    action = parser._option_string_actions.get(parser.canonical(f"--{name}"))
    if action is None or action.dest in ("help", "config"):
        raise UserError(f"{name}: main.py has no such flag")
    if value is None or (action.dest, value) == ("output_dir", action.default):
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) for item in values):
        raise UserError(f"{name}: expected a value or a list of values, not {value}")
    if action.dest == "demo":
        return []
    texts = [str(item) for item in values]
    if value is False and "off" in (action.choices or ()):
        texts = ["off"]  # YAML reads off as false
    return [f"--{name}", *texts] if isinstance(value, list) else [f"--{name}={texts[0]}"]


def explicit_flags(argv: Sequence[str]) -> dict[str, Any]:
    """-> {flag: value} of the flags that a command line names."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def recipe_flags(explicit: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """-> {flag: value} of `--recipe`, without flags that are given, or that a flag that is given excludes.

    explicit: `explicit_flags(argv)`.
    """
    if "recipe" not in explicit:
        return {}
    recipe, pretrained = RECIPES[explicit["recipe"]], explicit.get("pretrained", not explicit.get("demo"))
    if explicit["recipe"] == "strong":
        recipe = _with_whole_correction(recipe, explicit, argv)
    if not (pretrained or explicit.get("weights")):
        recipe = recipe | FROM_SCRATCH[explicit["recipe"]]
    return _fitting_defaults(recipe, explicit, argv, {"pretrained": pretrained})


def _with_whole_correction(recipe, explicit, argv):
    """-> `recipe`, with a whole correction instead of both halves if a flag that is given replaces one of them."""
    usual = {"use_augmentation": False, **recipe}
    if all(explicit.get(name, usual[name]) == usual[name] for name in CORRECTION):
        return recipe
    recipe = {name: value for name, value in recipe.items() if name not in WHOLE_CORRECTION}
    given = _with_defaults(recipe | {"train_loss": "ce"}, argv)
    if corrects_by_loss(given) or corrects_by_sampling(given) or given.crt_epochs:
        return recipe | {"train_loss": "ce"}
    if "sampling" in explicit:  # instance
        return recipe | {"train_loss": "logit_adjustment"}  # with the default tau, 1
    return recipe | {"train_loss": "ce", "sampling": "balanced"}


def _demo_defaults(explicit):
    """-> DEMO_DEFAULTS; a recipe corrects the imbalance in its own way."""
    return {k: v for k, v in DEMO_DEFAULTS.items() if "recipe" not in explicit or k not in CORRECTION}


def _fitting_defaults(defaults, explicit, argv, stronger=MappingProxyType({})):
    """-> those of `defaults` that are not given, and that no flag that is given, or one of `stronger`, excludes."""
    defaults = {name: value for name, value in defaults.items() if name not in explicit}
    broken = _names_of_broken_rules({**defaults, **stronger}, argv)
    excluded = {name for names in broken for name in names}
    return {name: value for name, value in defaults.items() if name not in excluded}


def _names_of_broken_rules(defaults, argv):
    """-> the flags of each of RULES that a command line breaks with these defaults."""
    args = _with_defaults(defaults, argv)
    return [names for names, is_broken, _ in RULES if is_broken(args)]


def _with_defaults(defaults, argv):
    parser = build_parser()
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def check_inherited(inherited: Mapping[str, Any], path: str | os.PathLike, flag: str = "--resume") -> None:
    """Raise UserError if a flag of the checkpoint at `path` has a value that no command line can give it.

    inherited: {flag: value}; flag: the flag that names the file.
    """
    for action in build_parser()._actions:
        if action.dest not in inherited or isinstance(action, argparse._StoreFalseAction):
            continue
        value = inherited[action.dest]
        try:
            values = value if action.nargs in ("+", 3) and value is not None else [value]
            is_valid = value in (None, action.default) or all(
                item == (action.type or str)(str(item)) and (not action.choices or item in action.choices)
                for item in values
            )
            is_valid = is_valid and (action.dest, value) != ("batch_size", "auto")  # a run has a number
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            is_valid = False
        if not is_valid:
            raise UserError(f"{flag}: {path} has been altered: its --{action.dest} is {value!r}")


def _forget_table(args, explicit):
    """`--eval_only` reads no table unless it is given again, and none of the training's subjects with a new one."""
    for name in ("labels", *COLUMN_FLAGS, *(("group_regex",) if "labels" in explicit else ())):
        if name not in explicit:
            setattr(args, name, None)


def _check_shares(args):
    """Raise UserError if `--split` has no images for a split without folders of its own."""
    for split, share in zip(SPLITS, args.split, strict=True):
        is_separate = args.split_column or getattr(args, f"{split}_dirs", None) or (args.folds and split == "test")
        if share == 0 and not is_separate:
            raise UserError(f"--split: {_text_of(args.split)} leaves no images for {split}")


def _check_folders(args):
    """Raise UserError if a folder of images is missing: before weights are downloaded and anything is imported."""
    if not (args.data_dirs or args.demo):
        raise UserError("--data_dirs: name the folder that holds the class folders (or try --demo)")
    for name in FOLDER_FLAGS:
        for folder in getattr(args, name) or []:
            check_is_folder(folder, f"--{name}")
    for path in args.labels or []:
        check_is_file(path, "--labels")


def _text_of(shares):
    return " ".join(f"{share:g}" for share in shares)


def _leaves_its_folder(args):
    is_training = args.resume and args.run_dir and not args.eval_only
    return is_training and os.path.abspath(args.run_dir) != os.path.dirname(os.path.abspath(args.resume))


def trains_all_folds(args: argparse.Namespace) -> bool:
    """Whether the command line asks for a whole cross-validation, not for one training."""
    return bool(args.folds) and args.fold is None and not (args.resume or args.check_data)


def _has_columns_without_table(args):
    return not args.labels and any(getattr(args, name) for name in COLUMN_FLAGS)


def _has_nothing_to_defer(args):
    return args.drw_epoch and not corrects_by_sampling(args) and args.train_loss not in WEIGHTED_LOSSES


def _has_no_main_stage(args):
    return (args.drw_epoch or args.crt_epochs) and args.drw_epoch + args.crt_epochs >= args.epochs


# (flags, whether they contradict each other, message)
RULES = (
    (
        ("check_data",),
        lambda a: a.check_data and (a.resume or a.auto_resume or a.eval_only),
        "--check_data: checks the images of a new run; omit --resume, --auto_resume and --eval_only",
    ),
    (
        ("check_data",),
        lambda a: a.check_data and num_ranks() > 1,
        "--check_data: is the work of one process; start it without torchrun",
    ),
    (("eval_only",), lambda a: a.eval_only and not a.resume, "--eval_only: name the checkpoint with --resume FILE"),
    (
        ("auto_resume",),
        lambda a: a.auto_resume and not a.run_dir,
        "--auto_resume: name the run folder with --run_dir DIR",
    ),
    (
        ("auto_resume", "resume"),
        lambda a: a.auto_resume and a.resume,
        "--auto_resume: finds the checkpoint in --run_dir by itself; omit --resume",
    ),
    (("data_dirs", "demo"), lambda a: a.data_dirs and a.demo, "--demo: draws its own data; omit --data_dirs"),
    (("labels", "demo"), lambda a: a.labels and a.demo, "--demo: draws its own data; omit --labels"),
    (
        ("image_column", "label_column", "subject_column", "split_column"),
        _has_columns_without_table,
        "--image_column / --label_column / --subject_column / --split_column: name the table with --labels FILE",
    ),
    (
        ("labels",),
        lambda a: a.labels and (a.val_dirs or a.test_dirs) and not a.eval_only,  # of which it may have inherited some
        "--labels: its images are found below --data_dirs, or with --eval_only below --test_dirs; omit the other "
        "folders, and name a column of published splits with --split_column",
    ),
    (
        ("group_regex", "subject_column"),
        lambda a: a.group_regex and a.subject_column,
        "--group_regex: the subjects are those of --subject_column {subject_column}; omit one of them",
    ),
    (
        ("split_column", "folds"),
        lambda a: a.split_column and a.folds,
        "--folds: makes the splits itself; omit --split_column",
    ),
    (
        ("fold", "folds"),
        lambda a: a.fold is not None and not (a.folds and a.fold < a.folds),
        "--fold: {fold} needs --folds K, and must be from 0 to K - 1",
    ),
    (
        ("folds",),
        lambda a: a.folds and not a.eval_only and (a.val_dirs or a.test_dirs),
        "--folds: makes the splits itself; omit --val_dirs and --test_dirs",
    ),
    (
        ("folds",),
        lambda a: trains_all_folds(a) and (a.wandb_id or {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} & os.environ.keys()),
        "--folds: each fold is a W&B run of its own; omit --wandb_id and the environment variable WANDB_RUN_ID, and in "
        "a sweep choose one with --fold",
    ),
    (
        ("zero_init", "pretrained", "weights"),
        lambda a: a.zero_init and (a.pretrained or a.weights),
        "--zero_init: for random weights only; add --no-pretrained and omit --weights, or add --no-zero_init",
    ),
    (
        ("split",),
        lambda a: abs(sum(a.split) - 1) > 1e-6,
        "--split: {split} does not sum to 1 (train val test, for example 0.6 0.2 0.2)",
    ),
    (
        ("sampling", "use_augmentation"),
        lambda a: a.use_augmentation and a.sampling != "instance",
        "--sampling: {sampling} and --use_augmentation both oversample; omit one of them",
    ),
    (
        ("drw_epoch", "use_augmentation", "sampling", "train_loss"),
        _has_nothing_to_defer,
        "--drw_epoch: there is nothing to defer; it needs --use_augmentation, --sampling, or "
        f"--train_loss {', '.join(WEIGHTED_LOSSES)}",
    ),
    (
        ("drw_epoch", "crt_epochs", "epochs"),
        _has_no_main_stage,
        "--drw_epoch / --crt_epochs: {drw_epoch} + {crt_epochs} use up all {epochs} epochs; leave at least one",
    ),
    (
        ("resume", "demo"),
        lambda a: a.resume and a.demo,
        "--demo: a run is resumed with its own images; omit --demo",
    ),
    (("resume",), lambda a: a.resume and not os.path.isfile(a.resume), "--resume: {resume} is not a file"),
    (
        ("resume", "run_dir"),
        _leaves_its_folder,
        "--run_dir: a run is resumed in the folder of its checkpoint {resume}; omit this flag",
    ),
)  # fmt: skip
