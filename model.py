"""The classifier, and writing and reading its checkpoints."""

import errno
import io
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

import resnet_custom
from files import Damaged, UserError, atomic_write
from utils import LDAM_SCALE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BATCH_COUNT = ".num_batches_tracked"  # of batch norm; torchvision's older files do without

CHECKPOINT_TYPES = {
    "epoch": int,  # the last finished one, -1 for none
    "position": (dict, type(None)),  # in the epoch after it, as `RunningFigures.position`; None: between two epochs
    "model_state_dict": dict,  # what was validated: with --ema the averaged weights
    "raw_state_dict": dict,  # with --ema those that are trained, else empty
    "averaged_steps": int,  # with --ema, over which the average goes
    "optimizer_state_dict": dict, "scheduler_state_dict": dict, "scaler_state_dict": dict,
    "posthoc": (dict, type(None)),  # tau and temperature, fitted when the training has ended
    "best_metric": float, "best_metric_name": str, "best_epoch": int,
    "history": list,  # the rows of history.csv
    "classes": list, "samples_per_cls": list, "args": dict, "wandb_id": (str, type(None)),
    "splits": dict,  # {part: [path]}
    "file_sizes": dict,  # {part: (N,) int64 tensor}, bytes
    "rng_state": dict,
}  # fmt: skip


class CosineHead(nn.Module):
    """Logits: `scale` times the cosine between an image's features and each class's weights (Cao et al. 2019, app. C).

    features: (N, num_features) -> (N, num_classes) float32. A long weight vector, as large classes grow, has no
    advantage.
    """

    def __init__(self, num_features, num_classes, scale=LDAM_SCALE):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(num_classes, num_features))
        self.reset_parameters()

    def reset_parameters(self):
        # of length 1: Adam's steps have one size, by which a long vector would hardly turn
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # a cosine has no digits to lose
            return self.scale * F.linear(F.normalize(features.float()), F.normalize(self.weight))


class Model(nn.Module):
    """ResNet-50 with last-stage stride 1 -> dropout -> linear head.

    images: (N, 3, H, W), uint8 RGB as decoded (normalised here, on the model's own device, so that nobody can forget
    to) or float already normalised by the ImageNet mean and standard deviation -> logits: (N, num_classes)
    """

    def __init__(self, num_classes, dropout_prob=0.3, cosine_head=False):
        super().__init__()
        self.backbone = resnet_custom.resnet50()
        num_features = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout_prob)
        self.head = (CosineHead if cosine_head else nn.Linear)(num_features, num_classes)
        self.is_backbone_frozen = False
        # not persistent: a checkpoint holds what was learned
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def normalise(self, images):
        """(N, 3, H, W) uint8 -> float32."""
        return torch.addcmul(self.shift, images.float(), self.scale)  # one pass over the memory

    def forward(self, images):
        if images.dtype == torch.uint8:
            images = self.normalise(images)
        return self.head(self.dropout(self.backbone(images)))

    def freeze_backbone(self):
        """From now on its weights get no gradients, and its batch norm does as in evaluation."""
        self.backbone.requires_grad_(False).eval()
        self.is_backbone_frozen = True

    def train(self, mode=True):
        super().train(mode)
        if self.is_backbone_frozen:
            self.backbone.eval()
        return self

    def load_initial_weights(self, state_dict, classes=None, own_classes=None):
        """Start from `state_dict` (see `read_weights`), with its head where it is alike and knows the same classes."""
        own_head = {f"head.{name}" for name in self.head.state_dict()}
        same_head = own_head == {name for name in state_dict if name.startswith("head.")}
        use_head = classes is not None and list(classes) == list(own_classes) and same_head
        chosen = {name: value for name, value in state_dict.items() if use_head or name.startswith("backbone.")}
        missing, unexpected = self.load_state_dict(chosen, strict=False)
        missing = {name for name in missing if not name.startswith("head.") and not name.endswith(BATCH_COUNT)}
        assert not unexpected and not missing, (missing, unexpected)


def backbone_state_dict(torchvision_state_dict):
    """Rename torchvision's ResNet-50 weights to ours and leave its head out."""
    return {f"backbone.{k}": v for k, v in torchvision_state_dict.items() if not k.startswith("fc.")}


def read_weights(path):
    """Initial weights from a local file -> (state dict in our names, its classes or None).

    `path`: a state dict of torchvision's ResNet-50, or one of our checkpoints.
    Raises UserError for anything else.
    """
    content = _load_file(path, "--weights")
    if isinstance(content, dict) and "model_state_dict" in content:
        state_dict, classes = content["model_state_dict"], content.get("classes")
    elif isinstance(content, dict) and "conv1.weight" in content:
        state_dict, classes = backbone_state_dict(content), None
    else:
        raise UserError(f"--weights: {path} is neither a ResNet-50 state dict nor a checkpoint of this project")
    with torch.device("meta"):
        expected = backbone_state_dict(resnet_custom.resnet50().state_dict())
    for name, tensor in expected.items():
        if name.endswith(BATCH_COUNT):
            continue
        if name not in state_dict or state_dict[name].shape != tensor.shape:
            raise UserError(f"--weights: {path} does not hold a ResNet-50: {name} is missing or of another shape")
    return state_dict, classes


def checkpoint_bytes(checkpoint):
    """`checkpoint`, a dict with the keys of CHECKPOINT_TYPES, as the bytes of its file."""
    assert set(checkpoint) == set(CHECKPOINT_TYPES)
    buffer = io.BytesIO()  # torch.save to a file would hide why a disk refused it
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def save_checkpoint(path, content, former=None):
    """Write `checkpoint_bytes` so that a crash leaves the former file or the whole new one. Raises OSError.

    former: a name that the former file is kept under.
    """
    with atomic_write(path, "wb", former) as file:
        file.write(content)


def load_checkpoint(path, flag="--resume"):
    """Read a checkpoint onto the CPU without running code from it.

    Raises UserError if it is not whole, not as it was written, or not ours.
    """
    checkpoint = _load_file(path, flag)
    wrong = _first_wrong_key(checkpoint if isinstance(checkpoint, dict) else {})
    if wrong:
        raise UserError(
            f"{flag}: {path} is not a checkpoint of this version of the project (its {wrong!r} is missing or wrong)"
        )
    return checkpoint


def _first_wrong_key(checkpoint):
    for key, kind in CHECKPOINT_TYPES.items():
        if key not in checkpoint or not isinstance(checkpoint[key], kind):
            return key
    if not all(isinstance(name, str) for name in checkpoint["classes"]):
        return "classes"
    if not {"cpu", "cuda"} <= checkpoint["rng_state"].keys():
        return "rng_state"
    for part in ("train", "val", "test"):
        paths, sizes = (checkpoint[key].get(part) for key in ("splits", "file_sizes"))
        if not isinstance(paths, list) or not isinstance(sizes, torch.Tensor) or len(paths) != len(sizes):
            return "splits"
    return None


def _load_file(path, flag):
    try:
        changed = zipfile.is_zipfile(path) and _first_changed_record(path)
        content = None if changed else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place to read from that no file can have
            raise Damaged(f"{flag}: {path} is damaged: its directory is not what was written") from error
        kind = Damaged if error.errno == errno.EIO else UserError
        raise kind(f"{flag}: {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the reader of pickles raises nearly anything on a file that is none
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{flag}: there is too little memory to read {path}") from error
        raise Damaged(f"{flag}: {path} is damaged, cut short, or not a file of PyTorch weights") from error
    if changed:
        raise Damaged(f"{flag}: {path} is damaged: {changed} in it is not what was written")
    return content


def _first_changed_record(path):
    """-> the name of a record that its CRC-32 does not fit, which torch.load does not look at, or None."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()
