"""A trained model as a file that other programs run: ONNX, torch.export, or the weights alone."""

import argparse
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor, nn

from calibration import TINY
from flag_queries import is_ordinal
from model import CosineHead, Model
from run.cli import UserError, first_line
from run.environment import commit
from run.files import read_json, valid_text
from utils import class_shares

OPSET = 18  # of ONNX
METADATA_FILE = "metadata.json"  # in a .pt2 file
COEFFICIENT_BITS = 22  # Pillow's coefficients of a resize are multiples of 2 ** -22
# since Pillow 13, an image whose height shrinks much more than its width is resized vertically first
HAS_VERTICAL_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


class PortableModel(nn.Module):
    """All that prediction does after decoding: resize as in the training, normalize, network, softmax.

    images: (N, H, W, 3) uint8 RGB of any sides -> probabilities: (N, C) float32. posthoc: {"tau", "temperature"} of the
    checkpoint, applied as `calibration.adjust` does; None for the plain softmax.
    """

    def __init__(
        self,
        network: Model,
        image_size: int,
        resize: str,
        posthoc: Mapping[str, float] | None = None,
        samples_per_cls: list[int] | None = None,
    ):
        super().__init__()
        self.network, self.image_size, self.resize = network, image_size, resize
        self.temperature = posthoc["temperature"] if posthoc else None
        if posthoc:
            prior = posthoc["tau"] * class_shares(samples_per_cls).double().log()
            self.register_buffer("prior", prior, persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        squares = square_as_pillow(images, self.image_size, self.resize)
        logits = self.network(self.network.normalize(squares))
        probabilities = torch.softmax(logits.float(), dim=1)
        if self.temperature is None:
            return probabilities
        adjusted = probabilities.clamp(min=TINY).double().log() / self.temperature - self.prior
        return torch.softmax(adjusted, dim=1).clamp(min=TINY).float()


# ---------------------------------------------------------------------------------------------------------- resizing


def square_as_pillow(images: Tensor, size: int, resize: str) -> Tensor:
    """`images.decode.to_square` as tensor operations that can be exported for any sides, equal to it to the bit.

    images: (N, H, W, 3) uint8 -> (N, 3, size, size) float32, whole numbers from 0 to 255. Each pass of the resize is a
    product with a matrix that depends on the sides.
    """
    # numbers that are computed from the sides are tensors: exported, a Python number would be a constant
    height, width = (torch.scalar_tensor(side, dtype=torch.int64) for side in images.shape[1:3])
    new_height = new_width = torch.scalar_tensor(size, dtype=torch.int64)
    box_height, box_width = height, width
    if resize == "crop":
        box_height = box_width = torch.minimum(height, width)
    elif resize == "pad":
        scale = new_height.double() / torch.maximum(height, width)  # a number / a tensor would be rounded twice
        new_height, new_width = ((side.double() * scale).round().long().clamp(min=1) for side in (height, width))
    rows = _coefficients(images.shape[1], box_height, new_height, size)
    columns = _coefficients(images.shape[2], box_width, new_width, size)

    def vertical_first(pixels, rows, columns):
        return _one_pass(_one_pass(pixels, rows=rows), columns=columns)

    def horizontal_first(pixels, rows, columns):
        return _one_pass(_one_pass(pixels, columns=columns), rows=rows)

    pixels = images.permute(0, 3, 1, 2).double()
    if not HAS_VERTICAL_FIRST:
        return horizontal_first(pixels, rows, columns).float()
    is_tall = height - new_height > 2 * (width - new_width).clamp(min=0)
    if not torch.compiler.is_exporting():
        return (vertical_first if is_tall else horizontal_first)(pixels, rows, columns).float()
    return torch.cond(is_tall, vertical_first, horizontal_first, (pixels, rows, columns)).float()


def _coefficients(side, box, new_side, size):
    """-> (size, side) float64, by which pixels are multiplied along one side.

    The box, `box` pixels in the middle of the `side` pixels, becomes `new_side` pixels in the middle of `size`; the
    rest is 0, black. A triangle filter as wide as two of the larger pixels, antialiased; like Pillow's, it also reads
    pixels beside the box. All coefficients are integers times 2 ** -22, and exact.
    """
    start, new_start = (side - box) // 2, (size - new_side) // 2
    old = torch.arange(side) - start
    new = (torch.arange(size) - new_start)[:, None]
    distance = ((2 * old + 1) * new_side - (2 * new + 1) * box).abs()  # of the centers, in 1 / (2 new_side) pixels
    weights = (2 * torch.maximum(box, new_side) - distance).clamp(min=0) * ((new >= 0) & (new < new_side))
    total = weights.sum(dim=1, keepdim=True).clamp(min=1)
    rounded = (weights * 2 ** (COEFFICIENT_BITS + 1) + total) // (2 * total)
    return rounded.double() / 2**COEFFICIENT_BITS


def _one_pass(pixels, rows=None, columns=None):
    """Resize (N, 3, H, W) float64 along one side and round to 8 bits, as Pillow does after each of its passes."""
    resized = rows @ pixels if columns is None else pixels @ columns.T
    return (resized + 0.5).floor().clamp(0, 255)


# ---------------------------------------------------------------------------------------------------------- metadata


def describe(checkpoint: Mapping[str, Any], args: argparse.Namespace, run_dir: Path, is_adjusted: bool) -> dict:
    """-> what the users of a model need to know, as text: words as they are, all else as JSON.

    checkpoint, args: of `inference.LoadedModel`; run_dir: folder of the checkpoint, whose results.json has the metrics
    if it is of the same epoch.
    """
    content = {
        "project": "skin-grading",
        "commit": commit() or "unknown",
        "torch": str(torch.__version__),
        "input": "images: (N, H, W, 3) uint8 RGB, upright, any height and width",
        "output": "probabilities: (N, number of classes) float32",
        "classes": checkpoint["classes"],
        "samples_per_cls": checkpoint["samples_per_cls"],
        "ordinal": is_ordinal(args),
        "image_size": args.image_size,
        "resize": args.resize,
        "cosine_head": args.train_loss == "ldam",
        "adjusted": is_adjusted,
        **(checkpoint["posthoc"] or {}),
        "epoch": checkpoint["epoch"],
        "metrics": _metrics(checkpoint, run_dir, is_adjusted),
    }
    # a class name that is not valid UTF-8 gets escapes, which JSON reads back as it was
    as_json = {key: valid_text(json.dumps(value, ensure_ascii=False)) for key, value in content.items()}
    return {key: value if isinstance(value, str) else as_json[key] for key, value in content.items()}


def _metrics(checkpoint, run_dir, is_adjusted):
    """-> {split: {metric: number, or its interval}}, empty if the run has no results for this model."""
    try:
        results = read_json(run_dir / "results.json")
        if results["evaluated_epoch"] != checkpoint["epoch"] or results["classes"] != checkpoint["classes"]:
            return {}
        source = results["posthoc"] if is_adjusted else results
        return {
            split: {k: v for k, v in source[split].items() if isinstance(v, (int, float)) or k.endswith("_ci")}
            for split in ("val", "test")
            if split in source
        }
    except FileNotFoundError:
        return {}
    except (UserError, OSError, LookupError, TypeError, AttributeError):  # the metrics are only informative
        print(f"{run_dir / 'results.json'} cannot be read: the metadata have no metrics")
        return {}


# ------------------------------------------------------------------------------------------------------------- files


def portable_bytes(model: PortableModel, metadata: Mapping[str, str], suffix: str) -> bytes:
    """-> the content of a file of this kind: .onnx, .pt2 or .safetensors. Raises UserError if an exporter fails."""
    write = {".onnx": _onnx_bytes, ".pt2": _pt2_bytes, ".safetensors": _safetensors_bytes}[suffix]
    try:
        with _quiet():
            return write(model, dict(metadata))
    except Exception as error:  # exporters raise nearly anything
        cause = error.__cause__ or error
        raise UserError(f"{suffix[1:]}: the export failed: {type(cause).__name__}: {first_line(cause)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what exporters print, log and warn of: it is about their own insides."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _example():
    """A batch to export with: no two of its sides are equal, and none is 1, which would be taken for a constant."""
    return torch.zeros((2, 37, 41, 3), dtype=torch.uint8)


def _onnx_bytes(model, metadata):
    import onnx

    sides = {0: "batch", 1: "height", 2: "width"}
    program = torch.onnx.export(
        model, (_example(),), dynamo=True, opset_version=OPSET, dynamic_shapes={"images": sides},
        input_names=["images"], output_names=["probabilities"], verbose=False,
    )  # fmt: skip
    proto = program.model_proto
    _forget_sources(proto.graph)
    onnx.helper.set_model_props(proto, {**metadata, "opset": str(OPSET)})
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _forget_sources(graph):
    """Remove what the exporter notes of each operation: lines of this project, with the paths of its files."""
    for item in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node):
        del item.metadata_props[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_sources(attribute.g)


def _pt2_bytes(model, metadata):
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (_example(),), dynamic_shapes={"images": {0: dynamic, 1: dynamic, 2: dynamic}})
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it has the paths of files
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata, ensure_ascii=False, indent=2)})
    return buffer.getvalue()


def _safetensors_bytes(model, metadata):
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in model.network.state_dict().items()}, metadata)


def open_portable(path: str | Path, model: PortableModel) -> Callable[[np.ndarray], np.ndarray]:
    """A file of `portable_bytes` -> function: (N, H, W, 3) uint8 -> probabilities (N, C) float32, on the CPU.

    model: the one that was exported, for a file with nothing but its weights.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".onnx":
        return _open_onnx(path)
    if suffix == ".pt2":
        with _quiet():
            module = torch.export.load(path).module()
    else:
        from safetensors.torch import load_file

        module = copy.deepcopy(model)
        is_cosine = isinstance(model.network.head, CosineHead)
        module.network = Model(len(model.network.head.weight), cosine_head=is_cosine).eval()
        module.network.load_state_dict(load_file(path))

    def run(images):
        with torch.inference_mode():
            return module(torch.from_numpy(images)).numpy()

    return run


def _open_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]
