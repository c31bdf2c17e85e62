"""The flags of `main.py`: what there is, what it may be, and what a resumed run takes over from its checkpoint."""

import argparse
import functools
import math
import os
import re
from pathlib import Path

import tracking
from dataset_double import AUGMENTATIONS, SAMPLINGS, check_fractions
from files import UserError
from image_cache import default_cache_dir
from model import load_checkpoint
from resuming import checkpoint_to_go_on_with
from utils import TRAIN_LOSSES, WEIGHTED_LOSSES

USAGE = """Train a ResNet-50 to grade skin conditions from very unequal class folders.

python main.py --demo
python main.py --data_dirs data/forehead_wrinkles --train_loss cb --use_augmentation
python main.py --resume checkpoints_20260101_120000/last_model.pth
python main.py --eval_only --resume checkpoints_20260101_120000/best_model.pth --test_dirs other/forehead_wrinkles
"""

DEMO_DEFAULTS = {
    "image_size": 64,
    "epochs": 8,
    "learning_rate": 1e-3,
    "use_augmentation": True,
    "pretrained": False,
    "wandb_mode": "disabled",
}
# flags of the checkpoint's run that say nothing about the run that resumes it
NOT_INHERITED = ("resume", "auto_resume", "eval_only", "run_dir", "demo", "wandb_id", "wandb_resume")
# flags that name a place to write to: a checkpoint from elsewhere must not choose one
WRITTEN_TO = ("cache_dir", "wandb_dir")
# flags whose work is done: the split is made, the training has begun, the best model so far was chosen
FIXED_ON_RESUME = ("split", "folds", "fold", "pretrained", "weights")
FIXED_IN_TRAINING = ("best_metric", "group_regex")  # the latter names persons in other images that are tested
# flags that change nothing of what a run learns; nor do W&B's
NEUTRAL_FLAGS = {
    "run_dir", "output_dir", "resume", "auto_resume", "device", "num_workers", "cache_dir", "no_cache", "save_every",
    "save_minutes", "max_megapixels",
}  # fmt: skip
BEST_METRICS = ("val_balanced_acc", "val_macro_f1")  # by which the best epoch can be chosen
# flags that set which image of an epoch comes when
ORDER_FLAGS = ("seed", "use_augmentation", "target_samples_per_class", "sampling", "drw_epoch", "crt_epochs", "ema")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


def number(cast, low=-math.inf, high=math.inf, below=math.inf, above=-math.inf):
    """An argparse type: a finite number, low <= n <= high, above < n < below."""

    def parse(text):
        value = cast(text)
        if not (math.isfinite(value) and low <= value <= high and above < value < below):
            bounds = {"at least": low, "at most": high, "below": below, "above": above}
            wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
            raise argparse.ArgumentTypeError(f"{text} is not {wanted or 'a finite number'}")
        return value

    parse.__name__ = cast.__name__
    return parse


def regex(text):
    try:
        return re.compile(text).pattern
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from error


def truth(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def add_switch(group, name, default, help):
    """`--name`, `--no-name`, and `--name=true` / `--name=false` as W&B sweeps write them."""
    group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=truth, metavar="BOOL", help=help)
    group.add_argument(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help="the contrary")


def build_parser():
    parser = Parser(
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        prog="main.py",
    )
    add_data_flags(parser.add_argument_group("data"))
    add_loss_flags(parser.add_argument_group("imbalance: loss"))
    add_sampling_flags(parser.add_argument_group("imbalance: what is trained on, and when"))
    add_training_flags(parser.add_argument_group("model and training"))
    add_run_flags(parser.add_argument_group("run"))
    add_wandb_flags(parser.add_argument_group("Weights & Biases"))
    return parser


@functools.cache
def flag_of(word):
    """--lr, --lr=0.1, --learning_rate, lr -> learning_rate: the flag that a word of the command line names."""
    option = f"--{word.removeprefix('--').partition('=')[0]}"
    return getattr(build_parser()._option_string_actions.get(option), "dest", option)


def is_neutral(name):
    return name in NEUTRAL_FLAGS or name.startswith("wandb_")


def add_data_flags(group):
    add = group.add_argument
    add("--data_dirs", nargs="+", metavar="DIR", help="folders of class folders, merged class by class")
    add("--val_dirs", nargs="+", metavar="DIR", help="validation images, instead of a share of --data_dirs")
    add("--test_dirs", nargs="+", metavar="DIR", help="test images, instead of a share of --data_dirs")
    shares = {"type": number(float), "nargs": 3, "metavar": ("TRAIN", "VAL", "TEST"), "default": [0.6, 0.2, 0.2]}
    add("--split", **shares, help="shares of the images, stratified by class [0.6 0.2 0.2]")
    add(
        "--group_regex",
        type=regex,
        metavar="REGEX",
        help="file names' part that names the person: no person is in two parts",
    )
    add("--folds", type=number(int, low=2), metavar="K", help="cross-validation: K trainings, each image tested once")
    add("--fold", type=number(int, low=0), metavar="I", help="only this training of the --folds, from 0 on")
    add("--image_size", type=number(int, low=32), default=224, help="side in pixels [224]")
    add_switch(group, "skip_broken", False, "leave out images that cannot be read, instead of stopping")
    add("--cache_dir", metavar="DIR", help=f"decoded images are kept here [{default_cache_dir()}]")
    switch = {"nargs": "?", "const": True, "type": truth, "metavar": "BOOL"}
    add("--no_cache", **switch, default=False, help="keep none: decode each image whenever it is used")
    add("--max_megapixels", type=number(float, above=0), default=200, help="larger images are refused [200]")
    add("--demo", action="store_true", help="draw a small synthetic data set and train on it")


def add_loss_flags(group):
    add = group.add_argument
    add("--train_loss", choices=TRAIN_LOSSES, default="cb", help="[cb]: Class-Balanced Focal loss")
    cb_forms = ("softmax", "sigmoid")
    beta = {"type": number(float, low=0, below=1), "default": 0.999}
    add("--beta", **beta, help="cb, ldam with --drw_epoch: 0 no weights, near 1 1/n [0.999]")
    add("--gamma", type=number(float, low=0), default=2.0, help="cb, focal: focus on hard images [2.0]")
    add("--cb_form", choices=cb_forms, default="softmax", help="cb: sigmoid is the paper's form [softmax]")
    add("--alpha", type=number(float, above=0), nargs="+", help="focal: weight, one or one a class [1]")
    add("--smoothing", type=number(float, low=0, below=1), default=0.1, help="label_smoothing [0.1]")
    add("--tau", type=number(float, low=0), default=1.0, help="logit_adjustment: 0 cross entropy, 1 equal classes [1]")
    add("--max_margin", type=number(float, low=0), default=0.5, help="ldam: of the smallest class [0.5]")
    add_switch(group, "ordinal", False, "the classes are grades in their order: report how far off predictions are")
    decay = {"type": number(float, above=0), "default": 2.0}
    add("--ordinal_decay", **decay, help="ordinal: the higher, the less of the target on other grades [2]")
    drw = {"type": number(int, low=0), "default": 0, "metavar": "E"}
    add("--drw_epoch", **drw, help="weights of the loss and oversampling from epoch E on, not before [0]")


def add_sampling_flags(group):
    add = group.add_argument
    add_switch(group, "use_augmentation", False, "oversample by augmented copies until classes are equal")
    add("--target_samples_per_class", type=number(int, low=1), metavar="N", help="oversample to N [largest class]")
    names = list(AUGMENTATIONS)
    add(
        "--augmentation_methods", nargs="+", choices=names, default=names, metavar="METHOD", help=f"[{' '.join(names)}]"
    )
    add_switch(group, "augment_all", False, "augment every training image, not only the further copies of one")
    add(
        "--sampling", choices=SAMPLINGS, default="instance", help="which classes' images are drawn how often [instance]"
    )
    crt = {"type": number(int, low=0), "default": 0, "metavar": "N"}
    add("--crt_epochs", **crt, help="in the last N epochs only a new head is trained, on balanced samples [0]")
    add("--mixup", type=number(float, low=0), default=0, metavar="A", help="mix pairs of images, Beta(A, A) [0: off]")
    add("--cutmix", type=number(float, low=0), default=0, metavar="A", help="paste a part of another image [0: off]")


def add_training_flags(group):
    add = group.add_argument
    add_switch(group, "pretrained", True, "start from torchvision's ImageNet weights [true]")
    add("--weights", metavar="FILE", help="start from this file: torchvision's, or a checkpoint of ours")
    add("--dropout_prob", type=number(float, low=0, below=1), default=0.3, help="before the head [0.3]")
    add("--epochs", type=number(int, low=1), default=100, help="[100]")
    add("--batch_size", type=number(int, low=1), default=32, help="[32]")
    add("--learning_rate", "--lr", type=number(float, above=0), default=1e-4, help="AdamW [1e-4]")
    add("--weight_decay", type=number(float, low=0), default=0.01, help="AdamW [0.01]")
    add("--warmup_epochs", type=number(float, low=0), default=1.0, help="warm-up, then half a cosine to zero [1]")
    add("--clip_grad", type=number(float, low=0), default=1.0, help="norm of the gradient; 0: off [1.0]")
    add("--grad_accum", type=number(int, low=1), default=1, help="batches a step of the optimizer [1]")
    ema = {"type": number(float, low=0, below=1), "default": 0, "metavar": "DECAY"}
    add("--ema", **ema, help="validate and keep averaged weights, as with 0.999 [0: off]")
    add_switch(group, "progressive", False, "train on small images first, on the whole size in the last third")
    metrics = {"choices": BEST_METRICS, "default": BEST_METRICS[0]}
    add("--best_metric", **metrics, help="decides which epoch is kept [val_balanced_acc]")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="mixed precision [auto]")
    add_switch(group, "compile", False, "torch.compile: minutes at the start, a faster step")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... [auto]")
    add("--num_workers", type=number(int, low=0), help="loader processes [0 on a CPU, up to 8 on a GPU]")
    add("--seed", type=number(int, low=0, below=2**32), default=42, help="[42]")


def add_run_flags(group):
    add = group.add_argument
    add("--output_dir", default="checkpoints", help="the run's folder is OUTPUT_DIR_YYYYMMDD_HHMMSS [checkpoints]")
    add("--run_dir", metavar="DIR", help="the run's folder, by its exact name; must be new")
    add("--resume", metavar="FILE", help="go on with a checkpoint; its flags are the defaults")
    add_switch(group, "auto_resume", False, "go on with the run in --run_dir; start it if it has not begun")
    add("--save_every", type=number(int, low=0), default=0, metavar="N", help="save every N steps too; 0: no [0]")
    minutes = {"type": number(float, low=0), "metavar": "M", "default": 10}
    add("--save_minutes", **minutes, help="save when an epoch takes longer; 0: no [10]")
    add_switch(group, "tta", False, "test with the mirror image too, reported beside")
    add_switch(group, "eval_only", False, "test the checkpoint of --resume, train nothing")


def add_wandb_flags(group):
    add = group.add_argument
    project = os.environ.get("WANDB_PROJECT", "skin-grading")
    add("--wandb_project", default=project, help="[WANDB_PROJECT, else skin-grading]")
    add("--wandb_name", default=os.environ.get("WANDB_NAME"), help="[WANDB_NAME, else the name of the run's folder]")
    add("--wandb_id", help="go on with this W&B run [that of the checkpoint]")
    add("--wandb_resume", choices=("never", "allow", "must"), default="allow", help="[allow]")
    add(
        "--wandb_mode",
        choices=tracking.MODES,
        default=tracking.default_mode(),
        help="[online; goes on offline by itself]",
    )
    add("--wandb_dir", metavar="DIR", help="where W&B keeps its files [WANDB_DIR, else the run's folder]")
    images = {"type": number(int, low=0), "default": 0, "metavar": "N"}
    add("--wandb_images", **images, help="upload the N worst mistakes of the test, with their photographs [0]")
    add_switch(group, "wandb_artifact", False, "upload the best checkpoint")


def first_look(argv):
    """-> the flags as they are given, without those of a checkpoint: enough to know the run's folder."""
    first, _ = build_parser().parse_known_args(argv)
    if first.eval_only and not first.resume:
        raise UserError("--eval_only: name the checkpoint to test with --resume FILE")
    if first.auto_resume and not first.run_dir:
        raise UserError("--auto_resume: name the run's folder with --run_dir DIR")
    if {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys() and not (first.run_dir or first.resume):
        # a sweep's trial: a folder of its own, in which it goes on when it is handed out again after preemption
        first.run_dir, first.auto_resume = f"{first.output_dir}_{os.environ['WANDB_RUN_ID']}", True
    if first.auto_resume and first.resume:
        raise UserError("--auto_resume: finds the checkpoint in --run_dir by itself; leave out --resume")
    return first


def parse_args(argv, run_dir):
    """-> (args, the checkpoint to go on with or None). The checkpoint's flags are the defaults of those not given."""
    parser, first = build_parser(), first_look(argv)
    checkpoint = load_checkpoint(first.resume) if first.resume else None
    if first.auto_resume:
        first.resume, checkpoint = checkpoint_to_go_on_with(run_dir) or (None, None)
    if checkpoint:
        known = vars(first).keys() - set(NOT_INHERITED)
        if "WANDB_MODE" in os.environ:
            known.discard("wandb_mode")
        inherited = {name: value for name, value in checkpoint["args"].items() if name in known}
        check_inherited(parser, inherited, first.resume)
        for name in WRITTEN_TO:
            if inherited.get(name) and not is_inside(inherited[name], run_dir):
                outside = inherited.pop(name)
                if not getattr(first, name):
                    print(f"--{name}: not {outside} as in the checkpoint, to use it again give it again")
        parser.set_defaults(**inherited)
    elif first.demo:
        parser.set_defaults(**DEMO_DEFAULTS)
    args = parser.parse_args(argv)
    args.resume, args.run_dir = first.resume and str(first.resume), str(run_dir)
    args.auto_resume = first.auto_resume
    for name in ("data_dirs", "val_dirs", "test_dirs"):  # absolute, so that a run can be resumed from anywhere
        if getattr(args, name):
            setattr(args, name, [os.path.abspath(folder) for folder in getattr(args, name)])
    args.cache_dir = args.cache_dir and os.path.abspath(args.cache_dir)
    if checkpoint:
        check_resume_flags(args, checkpoint)
    elif not (args.data_dirs or args.demo):
        raise UserError("--data_dirs: name the folder that holds the class folders (or try --demo)")
    elif args.data_dirs and args.demo:
        raise UserError("--demo: makes its own data; leave out --data_dirs")
    check_training_flags(args)
    separate = [part for part in ("val", "test") if getattr(args, f"{part}_dirs")]
    check_fractions(args.split, [*separate, "test"] if args.folds else separate)
    return args, checkpoint


def check_inherited(parser, inherited, path):
    """Raise UserError if a flag of a checkpoint is none that the command line could have given."""
    for action in parser._actions:
        if action.dest not in inherited or isinstance(action, argparse._StoreFalseAction):
            continue
        value = inherited[action.dest]
        try:
            values = value if action.nargs in ("+", 3) and value is not None else [value]
            fine = value in (None, action.default) or all(
                one == (action.type or str)(str(one)) and (not action.choices or one in action.choices)
                for one in values
            )
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            fine = False
        if not fine:
            raise UserError(f"--resume: {path} has been altered: its --{action.dest} is {value!r}")


def check_training_flags(args):
    """Raise UserError for flags that do not go together."""
    if args.fold is not None and not (args.folds and args.fold < args.folds):
        raise UserError(f"--fold: {args.fold} goes with --folds K, and is from 0 to K - 1")
    if args.folds and args.fold is None:
        raise UserError("--folds: name the training with --fold I (without it, a new run trains them all)")
    if args.folds and not args.eval_only and (args.val_dirs or args.test_dirs):
        raise UserError("--folds: makes the parts itself; leave out --val_dirs and --test_dirs")
    if args.use_augmentation and args.sampling != "instance":
        raise UserError(f"--sampling: {args.sampling} and --use_augmentation both oversample; leave one of them out")
    if args.drw_epoch and not (
        args.use_augmentation or args.sampling != "instance" or args.train_loss in WEIGHTED_LOSSES
    ):
        raise UserError(
            f"--drw_epoch: there is nothing to defer; it goes with --use_augmentation, with --sampling, or with "
            f"--train_loss {', '.join(WEIGHTED_LOSSES)}"
        )
    if args.drw_epoch + args.crt_epochs >= args.epochs and (args.drw_epoch or args.crt_epochs):
        raise UserError(
            f"--drw_epoch / --crt_epochs: {args.drw_epoch} and {args.crt_epochs} leave none of {args.epochs} epochs"
        )


def is_inside(path, folder):
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def parts_given_anew(args, former):
    """-> which of val and test come from other folders than in the training, whose flags are `former`."""
    return [part for part in ("val", "test") if getattr(args, f"{part}_dirs") != former[f"{part}_dirs"]]


def check_resume_flags(args, checkpoint):
    if args.demo and not args.auto_resume:
        raise UserError("--demo: a run is resumed with its own data; leave out --demo")
    args.demo = False  # the data are drawn
    if (args.train_loss == "ldam") != (checkpoint["args"].get("train_loss") == "ldam"):
        raise UserError("--train_loss: ldam has a head of its own, to or from which a trained model cannot change")
    fixed = FIXED_ON_RESUME if args.eval_only else FIXED_ON_RESUME + FIXED_IN_TRAINING
    if not parts_given_anew(args, checkpoint["args"]):
        fixed += ("group_regex",)
    for name in fixed:
        if getattr(args, name) != checkpoint["args"].get(name, getattr(args, name)):
            raise UserError(f"--{name}: stays what it was in a resumed run; leave this flag out, or start a new run")
