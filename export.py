#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Export a trained model to a file that other programs run, and check that it predicts the same."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from run.cli import Parser, UserError, end_process, progress_bar, run_command
from run.signals import Signals, Stopped

if TYPE_CHECKING:
    import numpy as np

    from inference import Grader
    from portable import PortableModel

DESCRIPTION = """Export a trained model with all that prediction does after decoding:
resize, normalization, network, softmax.

python export.py runs/x model.onnx --check photos/     ONNX, also for programs without PyTorch
python export.py runs/x model.pt2                      torch.export, for PyTorch without this project
python export.py runs/x weights.safetensors            the weights alone
"""
PACKAGES = {".onnx": ("onnx", "onnxscript"), ".pt2": (), ".safetensors": ("safetensors",)}  # needed for a file
LIMIT = 1e-4  # of the difference of a probability in --check
MAX_FULL_PIXELS = 50e6  # of a photograph at full size in --check, whose resize needs 24 bytes for each
MAX_LISTED = 20  # photographs that cannot be read


def build_parser() -> Parser:
    parser = Parser("export.py", DESCRIPTION)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder, or checkpoint")
    add("output", metavar="OUTPUT", help="file to write: its ending says which kind, .onnx, .pt2 or .safetensors")
    add("--adjusted", action="store_true", help="include the tau and temperature that were fitted after training [off]")
    add(
        "--check",
        nargs="+",
        metavar="PATH",
        help="photographs, and folders of photographs, for which the file must predict what predict.py does [none]",
    )
    add("--overwrite", action="store_true", help="replace OUTPUT if it exists [off]")
    return parser


def run(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    output = Path(args.output)
    check_output(output, args.overwrite, args.adjusted)
    check_packages(output.suffix.lower(), with_check=bool(args.check))
    is_written = False
    try:
        with Signals() as signals:
            from images.photographs import find_photographs

            photographs = find_photographs(args.check, "--check") if args.check else []
            with signals.deferred():  # torch aborts the process if a signal raises while it is imported
                import inference
                import portable  # noqa: F401
                from run.files import refuse_input
            checkpoints = inference.find_checkpoints(args.model)
            if len(checkpoints) > 1:
                raise UserError(
                    f"MODEL: {args.model} holds {len(checkpoints)} models; export one of them, such as {checkpoints[0]}"
                )
            refuse_input(output, [*checkpoints, *photographs], "OUTPUT")
            grader = inference.load(checkpoints, "cpu", adjusted=args.adjusted)
            model = export_model(grader, output)
            is_written = True
            return check(output, model, grader, photographs) if photographs else 0
    except Stopped as stop:
        print(f"stopped; {output} {'is complete' if is_written else 'was not written'}", file=sys.stderr)
        return stop.status


def check_output(output: Path, overwrite: bool, is_adjusted: bool) -> None:
    """Raise UserError if the output cannot be written, before the work of minutes."""
    suffix = output.suffix.lower()
    if suffix not in PACKAGES:
        *others, last = PACKAGES
        endings = f"{', '.join(others)} or {last}"
        raise UserError(f"OUTPUT: {output} must end in {endings}, which says what kind of file is written")
    if suffix == ".safetensors" and is_adjusted:
        raise UserError(
            "--adjusted: a .safetensors file holds the weights alone; its metadata have tau and temperature"
        )
    from run.files import refuse_output

    refuse_output(output, "OUTPUT", overwrite)


def check_packages(suffix: str, with_check: bool) -> None:
    """Raise UserError if an optional package is missing that this kind of file needs."""
    needed = [*PACKAGES[suffix], *(["onnxruntime"] if with_check and suffix == ".onnx" else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"OUTPUT: {suffix} needs packages that are not installed: {', '.join(missing)}; "
            f"pip install {' '.join(missing)}"
        )


def export_model(grader: "Grader", output: Path) -> "PortableModel":
    """Write the model of `grader` to `output`. -> the exported model"""
    from portable import OPSET, PortableModel, describe, portable_bytes
    from run.files import write_bytes

    (loaded,), suffix = grader.models, output.suffix.lower()
    posthoc = loaded.checkpoint["posthoc"] if grader.adjusted else None
    samples_per_cls = loaded.checkpoint["samples_per_cls"]
    model = PortableModel(loaded.model, grader.image_size, grader.resize, posthoc, samples_per_cls)
    metadata = describe(loaded.checkpoint, loaded.args, loaded.path.parent, grader.adjusted)
    content = portable_bytes(model, metadata, suffix)
    write_bytes(output, content)
    kind = {".onnx": f"ONNX, opset {OPSET}", ".pt2": "torch.export", ".safetensors": "weights"}[suffix]
    print(f"exported {loaded.path} to {output} ({kind}, {len(content) / 1e6:.1f} MB)")
    return model


def check(output: Path, model: "PortableModel", grader: "Grader", photographs: Sequence[str]) -> int:
    """Compare the file with the predictions of `grader` in float32, photograph by photograph. -> exit status

    Both get the same pixels, decoded as in the training. A second comparison, without a limit, gives the file the
    pixels of a plain decode at full size.
    """
    import numpy as np

    from images.decode import failure_reason, load_image
    from portable import open_portable
    from run.cli import printable

    predict, unreadable = open_portable(output, model), []
    decoded, plain = Differences(), Differences()
    for photo in progress_bar(photographs, "checking", unit="photo"):
        try:
            pixels, full = (np.array(load_image(photo, side)) for side in (grader.image_size, None))
        except Exception as error:  # whatever the decoder raises is the reason in the list
            unreadable.append(f"{printable(photo)}: {failure_reason(error, photo)}")
            continue
        expected = grader.probabilities_of([pixels], precise=True)
        actual = predict(pixels[np.newaxis])
        decoded.add(photo, expected, actual)
        if full.shape == pixels.shape:
            plain.add(photo, expected, actual)
        elif full.size <= 3 * MAX_FULL_PIXELS:
            plain.add(photo, expected, predict(full[np.newaxis]))
    if unreadable:
        more = f" ... and {len(unreadable) - MAX_LISTED} more" if len(unreadable) > MAX_LISTED else ""
        head = f"{len(unreadable)} of {len(photographs)} photographs cannot be read:"
        print("\n  ".join([head, *unreadable[:MAX_LISTED]]) + more)
    if not decoded.count:
        print("--check: nothing was compared", file=sys.stderr)
        return 1
    print(f"checked against predict.py in float32 (limit {LIMIT:g}): {decoded}")
    print(f"with photographs decoded at full size (no limit): {plain}")
    if not decoded.largest <= LIMIT:  # also if it is not a number
        print(f"--check: {output} does not predict what predict.py does", file=sys.stderr)
        return 1
    return 1 if unreadable else 0


class Differences:
    """How far two predictions are apart, over many photographs."""

    def __init__(self):
        self.count, self.changed, self.largest, self.where = 0, 0, 0.0, None

    def add(self, photo: str, expected: "np.ndarray", actual: "np.ndarray") -> None:
        """expected, actual: (1, C) probabilities"""
        difference = float(abs(expected - actual).max())
        self.count += 1
        self.changed += int(expected.argmax() != actual.argmax())
        if not difference <= self.largest:  # also if it is not a number
            self.largest, self.where = difference, photo

    def __str__(self) -> str:
        from run.cli import printable

        where = f" ({printable(self.where)})" if self.where else ""
        return (
            f"largest difference of a probability {self.largest:.2g}{where}, another class for {self.changed} of "
            f"{self.count} photographs"
        )


def main(argv: list[str] | None = None) -> int:
    """-> exit status, see `run_command`."""
    return run_command(run, argv)


if __name__ == "__main__":
    end_process(main())
