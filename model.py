"""The classifier and its checkpoints."""

import argparse
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_custom
from flags import SPLITS
from run.cli import UserError
from run.files import write_bytes
from run.torch_file import read_torch_file
from utils import LDAM_SCALE

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_COUNT = ".num_batches_tracked"  # of batch norm; older files of torchvision lack it
CHECKPOINT_TYPES = {
    "epoch": int,  # the last finished one, -1 for none
    "position": (dict, type(None)),  # in the epoch after it, as `RunningMetrics.epoch_state`; None: between two epochs
    "model_state_dict": dict,  # the validated weights: with --ema the averaged ones
    "raw_state_dict": dict,  # with --ema the weights in training, else empty
    "averaged_steps": int,  # with --ema, the number of averaged steps
    "optimizer_state_dict": dict, "scheduler_state_dict": dict, "scaler_state_dict": dict,
    # tau and temperature for --best_metric and for macro F1, fitted at the end of the training
    "posthoc": (dict, type(None)), "posthoc_macro_f1": (dict, type(None)),
    # {"probabilities": (N, C) float32, "targets": (N,) int64} of the val images in the order of "splits", stored when
    # the training has ended, for prediction sets
    "val_outputs": (dict, type(None)),
    "best_metric": float, "best_metric_name": str, "best_epoch": int,
    "history": list,  # the rows of history.csv
    "classes": list, "samples_per_cls": list, "args": dict, "wandb_id": (str, type(None)),
    "splits": dict, "file_sizes": dict,  # {split: [N paths]}, {split: (N,) int64 tensor of bytes}
    "rng_state": dict,
    "decoder_version": int,  # of the training images, see images/decode.py
    "table": (dict, type(None)),  # labels and columns of `--labels`, see images/table_state.py
}  # fmt: skip
# what older checkpoints, which lack these keys, mean
ABSENT_KEYS = {"decoder_version": 1, "val_outputs": None, "table": None, "posthoc_macro_f1": None}


class CosineHead(nn.Module):
    """Logits: LDAM_SCALE times the cosine of an image's features and each class's weights (Cao et al. 2019, app. C).

    features: (N, num_features) -> (N, num_classes) float32. Large classes tend to get long weight vectors; here length
    gives no advantage.
    """

    def __init__(self, num_features: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # of length 1: Adam's steps have a fixed size, which would hardly turn a long vector
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # a cosine needs all its digits
            return LDAM_SCALE * F.linear(F.normalize(features.float()), F.normalize(self.weight))


class Model(nn.Module):
    """ResNet-50 with last-stage stride 1 -> dropout -> linear head, or `CosineHead`.

    images: (N, 3, H, W), either uint8 RGB, which the model normalizes itself, or float, already normalized by the
    ImageNet mean and standard deviation -> logits: (N, num_classes).
    """

    def __init__(self, num_classes: int, dropout_prob: float = 0.3, cosine_head: bool = False, zero_init: bool = False):
        super().__init__()
        self.backbone = resnet_custom.resnet50(zero_init=zero_init)
        num_features = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout_prob)
        self.head = (CosineHead if cosine_head else nn.Linear)(num_features, num_classes)
        self.is_backbone_frozen = False
        # not persistent: a checkpoint holds what was learned
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> float32."""
        return torch.addcmul(self.shift, images.float(), self.scale)  # one pass over the memory

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = self.normalize(images)
        return self.head(self.dropout(self.backbone(images)))

    def freeze_backbone(self) -> None:
        """From now on the backbone gets no gradients, and its batch norm stays in evaluation mode."""
        self.backbone.requires_grad_(False).eval()
        self.is_backbone_frozen = True

    def train(self, mode: bool = True) -> "Model":
        super().train(mode)
        if self.is_backbone_frozen:
            self.backbone.eval()
        return self

    def load_initial_weights(self, state_dict: dict, weight_classes: list[str] | None, classes: list[str]) -> None:
        """Start from what `read_weights` returned. The head is loaded only if it is of this kind, for these classes."""
        head = {f"head.{name}" for name in self.head.state_dict()}
        use_head = weight_classes == classes and head == {name for name in state_dict if name.startswith("head.")}
        chosen = {name: value for name, value in state_dict.items() if use_head or name.startswith("backbone.")}
        missing, unexpected = self.load_state_dict(chosen, strict=False)
        missing = [name for name in missing if not name.startswith("head.") and not name.endswith(BATCH_COUNT)]
        assert not unexpected and not missing, (missing, unexpected)


def backbone_state_dict(torchvision_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of torchvision's ResNet-50 to those of `Model`, without the head."""
    return {f"backbone.{k}": v for k, v in torchvision_state_dict.items() if not k.startswith("fc.")}


def initial_weights(args: argparse.Namespace) -> tuple[dict[str, Tensor], list[str] | None] | None:
    """-> (state dict, its classes or None) of `--weights` or `--pretrained`, None for random weights."""
    if args.weights:
        return read_weights(args.weights)
    if args.pretrained:
        return backbone_state_dict(resnet_custom.imagenet_state_dict()), None
    return None


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Initial weights from a local file. -> (state dict with the names of `Model`, its classes or None).

    path: a state dict of torchvision's ResNet-50, or a checkpoint of this project. Raises UserError for anything else.
    """
    content = read_torch_file(path, "--weights")
    if isinstance(content, dict) and "model_state_dict" in content:
        state_dict, classes = content["model_state_dict"], content.get("classes")
    elif isinstance(content, dict) and "conv1.weight" in content:
        state_dict, classes = backbone_state_dict(content), None
    else:
        raise UserError(f"--weights: {path} is neither a ResNet-50 state dict nor a checkpoint of this project")
    with torch.device("meta"):
        expected = backbone_state_dict(resnet_custom.resnet50().state_dict())
    for name, tensor in expected.items():
        if not name.endswith(BATCH_COUNT) and (name not in state_dict or state_dict[name].shape != tensor.shape):
            raise UserError(f"--weights: {path} does not hold a ResNet-50: {name} is missing or has another shape")
    return state_dict, classes


def checkpoint_bytes(checkpoint: dict) -> bytes:
    """`checkpoint`, a dict with the keys of CHECKPOINT_TYPES, as the bytes of its file."""
    assert set(checkpoint) == set(CHECKPOINT_TYPES)
    buffer = io.BytesIO()  # torch.save to a file would hide why a disk refused it
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint. A crash at any moment leaves the previous file or the new one. Raises OSError."""
    write_bytes(path, checkpoint_bytes(checkpoint))


def load_checkpoint(path: str | Path, flag: str = "--resume") -> dict:
    """Raises Damaged if the file is not as it was written, UserError if it cannot be read or is not a checkpoint."""
    checkpoint = read_torch_file(path, flag)
    if isinstance(checkpoint, dict):
        for key, value in ABSENT_KEYS.items():
            checkpoint.setdefault(key, value)
    if key := _first_wrong_key(checkpoint if isinstance(checkpoint, dict) else {}):
        raise UserError(f"{flag}: {path} is not a checkpoint of this version: its {key!r} is missing or invalid")
    return checkpoint


def _first_wrong_key(checkpoint):
    for key, kind in CHECKPOINT_TYPES.items():
        if key not in checkpoint or not isinstance(checkpoint[key], kind):
            return key
    if not all(isinstance(name, str) for name in checkpoint["classes"]):
        return "classes"
    if not {"cpu", "cuda"} <= checkpoint["rng_state"].keys():
        return "rng_state"
    for split in SPLITS:
        paths, sizes = (checkpoint[key].get(split) for key in ("splits", "file_sizes"))
        if not isinstance(paths, list) or not isinstance(sizes, Tensor) or len(paths) != len(sizes):
            return "splits"
    return None


def weights_do_not_fit(path: str | Path, error: Exception, flag: str = "--resume") -> UserError:
    """error: of a `load_state_dict`, whose first line does not say what does not fit."""
    reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
    return UserError(f"{flag}: {path} does not fit this network: {reason[:300]}")
