"""The flags of `main.py`: their names, types, choices, defaults and help; those of the data are in data_flags.py."""

import argparse
import os
from typing import Any

from data_flags import add_data_flags, add_subgroup_flag
from run.cli import Parser, UserError, add_switch, boolean, number

DESCRIPTION = """Train a ResNet-50 to grade skin conditions from very imbalanced class folders.

python main.py --demo
python main.py --data_dirs data/forehead_wrinkles --recipe strong --rotation 15
python main.py --data_dirs photos --labels metadata.csv
python main.py --data_dirs data/forehead_wrinkles --check_data
python main.py --resume checkpoints_20260101_120000/last_model.pth
python main.py --eval_only --resume checkpoints_20260101_120000/best_model.pth --test_dirs other/forehead_wrinkles

Defaults are in brackets. --no-NAME turns a switch off: --no-pretrained, --no-use_augmentation. docs/flags.md says more.
"""

# ---------------------------------------------------------------------------------------------------------- choices
# plain tuples, which the modules that implement them import: parsing needs no torch

SPLITS = ("train", "val", "test")
TRAIN_LOSSES = (
    "cross_entropy", "ce", "focal", "cb", "label_smoothing",
    "weighted_ce", "balanced_softmax", "logit_adjustment", "ldam", "ordinal",
)  # fmt: skip
WEIGHTED_LOSSES = ("cb", "weighted_ce", "ldam")  # their class weights are what `--drw_epoch` defers
CB_FORMS = ("softmax", "sigmoid")
SAMPLINGS = ("instance", "balanced", "sqrt", "progressive")
AUGMENTATIONS = ("horizontal_flip", "rotation", "scale", "shear", "shift", "color_jitter")
MAX_ROTATION = 15.0  # degrees, to either side
AMP_MODES = ("auto", "off", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")
BEST_METRICS = ("val_balanced_acc", "val_macro_f1")
WANDB_MODES = ("online", "offline", "disabled")
BATCH_SIZE = 32  # the default; with `--batch_size auto`, `--learning_rate` is that of batches of this size

DEMO_DEFAULTS = {
    "image_size": 64,
    "epochs": 8,
    "learning_rate": 1e-3,
    "use_augmentation": True,
    "pretrained": False,
    "wandb_mode": "disabled",
}
# {name: flags of `--recipe`}; those of the command line win
RECIPES = {
    "two_level": {"train_loss": "cb", "use_augmentation": True},
    "strong": {
        "train_loss": "logit_adjustment", "tau": 0.5, "sampling": "sqrt",  # half of the correction each
        "augment_all": True, "rotation": 180, "ema": 0.99,
    },
}  # fmt: skip
# the correction of imbalance in `strong`; if one of these is given another value, it takes the place of all
CORRECTION = ("train_loss", "sampling", "use_augmentation")
WHOLE_CORRECTION = (*CORRECTION, "tau")  # with its strength, which can be given another value alone
# further flags of a recipe for a training that starts from random weights
FROM_SCRATCH = {"two_level": {}, "strong": {"learning_rate": 1e-3, "zero_init": True, "optimizer": "muon"}}
# flags that do not change what a run learns; nor do those of W&B
NEUTRAL_FLAGS = {
    "run_dir", "output_dir", "resume", "auto_resume", "device", "num_workers", "cache_dir", "no_cache", "save_every",
    "save_minutes", "max_megapixels", "subgroup_columns", "recipe",
}  # fmt: skip
# flags that concern the process, not the run: neither a checkpoint nor a file of flags hands them on
NOT_INHERITED = (
    "resume", "auto_resume", "eval_only", "check_data", "run_dir", "demo", "wandb_id", "wandb_resume",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ definitions


def build_parser() -> Parser:
    parser = Parser("main.py", DESCRIPTION)
    add_data_flags(parser.add_argument_group("data"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_loss_flags(parser.add_argument_group("loss"))
    _add_sampling_flags(parser.add_argument_group("sampling and augmentation (training images only)"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_schedule_flags(parser.add_argument_group("stages, and which epoch is kept"))
    _add_evaluation_flags(parser.add_argument_group("evaluation"))
    _add_run_flags(parser.add_argument_group("run and saving"))
    _add_machine_flags(parser.add_argument_group("machine"))
    _add_wandb_flags(parser.add_argument_group("Weights & Biases"))
    return parser


def complete_flags(stored: dict[str, Any]) -> dict[str, Any]:
    """-> all flags of a run: those that it has stored, and the defaults of those that are newer than it."""
    return vars(build_parser().parse_args([])) | stored


def _add_model_flags(group):
    add = group.add_argument
    add_switch(
        group, "pretrained", True, "start from torchvision's ImageNet weights; --no-pretrained: from random ones"
    )
    add(
        "--weights", metavar="FILE", help="start from this file: torchvision's weights, or a checkpoint of a run [none]"
    )
    add_switch(group, "zero_init", False, "--no-pretrained: each block of the network starts as the identity")
    add(
        "--dropout_prob",
        type=number(float, low=0, below=1),
        default=0.3,
        metavar="P",
        help="probability of dropout before the head [0.3]",
    )


def _add_loss_flags(group):
    add = group.add_argument
    add(
        "--train_loss",
        choices=TRAIN_LOSSES,
        default="cb",
        metavar="NAME",
        help=f"{', '.join(TRAIN_LOSSES)}; cb is the Class-Balanced Focal loss [cb]",
    )
    add(
        "--beta",
        type=number(float, low=0, below=1),
        default=0.999,
        metavar="B",
        help="cb, and ldam with --drw_epoch: 0 for equal class weights, near 1 for weights of 1/n [0.999]",
    )
    add(
        "--gamma",
        type=number(float, low=0),
        default=2.0,
        metavar="G",
        help="cb, focal: focus on hard images, 0 for none [2.0]",
    )
    add("--cb_form", choices=CB_FORMS, default="softmax", help="cb: softmax, or sigmoid as in the paper [softmax]")
    add(
        "--alpha",
        type=number(float, above=0),
        nargs="+",
        metavar="A",
        help="focal: one weight, or one per class in the order of the classes [1]",
    )
    add(
        "--smoothing",
        type=number(float, low=0, below=1),
        default=0.1,
        metavar="S",
        help="label_smoothing: share of the target spread over all classes [0.1]",
    )
    add(
        "--tau",
        type=number(float, low=0),
        default=1.0,
        metavar="T",
        help="logit_adjustment: 0 is cross entropy, 1 corrects the class shares [1]",
    )
    add(
        "--max_margin",
        type=number(float, low=0),
        default=0.5,
        metavar="M",
        help="ldam: margin of the smallest class [0.5]",
    )
    add_switch(group, "ordinal", False, "the classes are ordered grades: report how far off predictions are")
    add(
        "--ordinal_decay",
        type=number(float, above=0),
        default=2.0,
        metavar="D",
        help="ordinal: the higher, the less weight on neighboring grades [2]",
    )


def _add_sampling_flags(group):
    add = group.add_argument
    add_switch(group, "use_augmentation", False, "oversample with augmented copies until all classes are equal")
    add(
        "--target_samples_per_class",
        type=number(int, low=1),
        metavar="N",
        help="--use_augmentation: images per class and epoch [as many as the largest class]",
    )
    add(
        "--augmentation_methods",
        nargs="+",
        choices=list(AUGMENTATIONS),
        default=list(AUGMENTATIONS),
        metavar="METHOD",
        help=f"how copies are changed [{' '.join(AUGMENTATIONS)}]",
    )
    add(
        "--rotation",
        type=number(float, low=0, high=180),
        default=MAX_ROTATION,
        metavar="DEGREES",
        help="rotation by at most so many degrees to either side; 180 if photographs have no upright [15]",
    )
    add_switch(group, "augment_all", False, "augment every training image, not only the copies")
    add("--sampling", choices=SAMPLINGS, default="instance", help="how often each class is drawn [instance]")
    add(
        "--mixup",
        type=number(float, low=0),
        default=0,
        metavar="A",
        help="mix pairs of images with shares drawn from Beta(A, A) [0: off]",
    )
    add(
        "--cutmix",
        type=number(float, low=0),
        default=0,
        metavar="A",
        help="paste a region of another image, its share drawn from Beta(A, A) [0: off]",
    )


def _add_training_flags(group):
    add = group.add_argument
    add(
        "--recipe",
        choices=list(RECIPES),
        metavar="NAME",
        help=f"defaults for many flags at once: {', '.join(RECIPES)}; flags that are given win [none]",
    )
    add("--epochs", type=number(int, low=1), default=100, metavar="N", help="number of epochs [100]")
    add(
        "--batch_size",
        type=number(int, low=1, word="auto"),
        default=BATCH_SIZE,
        metavar="N",
        help="images per batch; auto: as many as fit into the memory of the GPU, with a learning rate to match [32]",
    )
    add("--grad_accum", type=number(int, low=1), default=1, metavar="N", help="batches per optimizer step [1]")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default=OPTIMIZERS[0],
        help="muon: orthogonalized updates for convolutions of up to 256 channels [adamw]",
    )
    add(
        "--learning_rate",
        "--lr",
        type=number(float, above=0),
        default=1e-4,
        metavar="LR",
        help="learning rate of AdamW [1e-4]",
    )
    add(
        "--warmup_epochs",
        type=number(float, low=0),
        default=1.0,
        metavar="E",
        help="epochs of linear warm-up, before the cosine decay to zero [1]",
    )
    add("--weight_decay", type=number(float, low=0), default=0.01, metavar="W", help="decoupled weight decay [0.01]")
    add(
        "--clip_grad",
        type=number(float, low=0),
        default=1.0,
        metavar="NORM",
        help="clip the gradient norm at NORM, 0: off [1.0]",
    )
    add(
        "--ema",
        type=number(float, low=0, below=1),
        default=0,
        metavar="DECAY",
        help="validate and keep the moving average of the weights, for example with 0.999 [0: off]",
    )
    add(
        "--seed",
        type=number(int, low=0, below=2**32),
        default=42,
        metavar="N",
        help="seed of the split, the weights, the order and the augmentation [42]",
    )


def _add_schedule_flags(group):
    add = group.add_argument
    add(
        "--drw_epoch",
        type=number(int, low=0),
        default=0,
        metavar="E",
        help="class weights and oversampling start after E epochs [0]",
    )
    add(
        "--crt_epochs",
        type=number(int, low=0),
        default=0,
        metavar="N",
        help="the last N epochs train only a new head, on balanced samples [0]",
    )
    add_switch(group, "progressive", False, "train on smaller images first, on the full size in the last third")
    add(
        "--patience",
        type=number(int, low=1),
        metavar="N",
        help="stop when --best_metric has not improved for N epochs; the learning rate is that of all --epochs [off]",
    )
    add(
        "--best_metric",
        choices=BEST_METRICS,
        default=BEST_METRICS[0],
        help="validation metric that selects the epoch to keep [val_balanced_acc]",
    )


def _add_evaluation_flags(group):
    add_switch(group, "eval_only", False, "test the checkpoint of --resume without training")
    add_switch(group, "tta", False, "also test with the mean over each image and its mirror image")
    add_subgroup_flag(group)


def _add_run_flags(group):
    add = group.add_argument
    add_switch(group, "check_data", False, "check the images and write a page about them, without training")
    add(
        "--config",
        default=argparse.SUPPRESS,  # replaced by the flags in it before anything is parsed
        metavar="FILE",
        help="YAML or JSON file of flags, also args.json of another run; the command line wins [none]",
    )
    add(
        "--output_dir",
        default="checkpoints",
        metavar="PREFIX",
        help="the run folder is PREFIX_YYYYMMDD_HHMMSS, or inside PREFIX if that is a folder [checkpoints]",
    )
    add(
        "--run_dir",
        metavar="DIR",
        help="name of the run folder; it must not exist yet, except with --auto_resume [PREFIX_YYYYMMDD_HHMMSS]",
    )
    add("--resume", metavar="FILE", help="resume from a checkpoint; its flags are the defaults [none]")
    add_switch(group, "auto_resume", False, "resume the run in --run_dir, or start it")
    add(
        "--save_every",
        type=number(int, low=0),
        default=0,
        metavar="N",
        help="also save every N optimizer steps [0: off]",
    )
    add(
        "--save_minutes",
        type=number(float, low=0),
        default=10,
        metavar="M",
        help="save every M minutes within an epoch, 0: off [10]",
    )


def _add_machine_flags(group):
    add = group.add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps ... [auto]")
    add("--amp", choices=AMP_MODES, default="auto", help="mixed precision [auto]")
    add_switch(group, "compile", False, "use torch.compile: minutes longer at the start, faster steps")
    add_switch(group, "sync_bn", True, "several processes: batch normalization over the images of all of them")
    add(
        "--num_workers",
        type=number(int, low=0),
        metavar="N",
        help="loader processes [0; for a GPU up to 8 if images are not cached]",
    )
    add("--cache_dir", metavar="DIR", help="folder for decoded images [~/.cache/skin-grading]")
    add(
        "--no_cache",
        nargs="?",
        const=True,
        default=False,
        type=boolean,
        metavar="BOOL",
        help="do not cache decoded images; decode each image whenever it is used [off]",
    )


def _add_wandb_flags(group):
    add = group.add_argument
    project = os.environ.get("WANDB_PROJECT", "skin-grading")
    add("--wandb_project", default=project, metavar="NAME", help="W&B project [WANDB_PROJECT, else skin-grading]")
    add(
        "--wandb_name",
        default=os.environ.get("WANDB_NAME"),
        metavar="NAME",
        help="name of the W&B run [WANDB_NAME, else that of the run folder]",
    )
    add("--wandb_id", metavar="ID", help="resume this W&B run [the one of the checkpoint]")
    add(
        "--wandb_resume",
        choices=("never", "allow", "must"),
        default="allow",
        help="whether the run of --wandb_id may or must exist already [allow]",
    )
    add(
        "--wandb_mode",
        choices=WANDB_MODES,
        default=default_wandb_mode(),
        help="online falls back to offline [WANDB_MODE, else online]",
    )
    add("--wandb_dir", metavar="DIR", help="where W&B keeps its files [WANDB_DIR, else the run folder]")
    add(
        "--wandb_images",
        type=number(int, low=0),
        default=0,
        metavar="N",
        help="upload the N worst mistakes of the test with their photographs [0]",
    )
    add_switch(group, "wandb_artifact", False, "upload the best checkpoint")


def default_wandb_mode() -> str:
    """`WANDB_MODE` where it is set, else online. Raises UserError if it is not a mode."""
    mode = os.environ.get("WANDB_MODE") or "online"
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in WANDB_MODES:
        raise UserError(f"WANDB_MODE: {mode} is not one of {', '.join(WANDB_MODES)}")
    return mode
