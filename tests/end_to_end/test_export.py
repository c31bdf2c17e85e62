"""export.py: its files, that they predict what predict.py does, and its mistakes in one line."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import PATIENCE, ROOT, changed_checkpoint, write_images
from PIL import Image
from thin_main import thin_resnet50

import export
import portable
import resnet_custom
from inference import load
from model import load_checkpoint
from run.saver import BEST

pytestmark = pytest.mark.usefixtures("thin_network")
CLASSES = ["0", "2", "10"]


def run_export(*words):
    """export.py in this process. -> exit status"""
    return export.main([str(word) for word in words])


def checkpoint_with_resize(run_dir, path, resize):
    args = load_checkpoint(run_dir / BEST)["args"]
    return changed_checkpoint(run_dir, path, args={**args, "resize": resize})


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Of several shapes; the last is decoded at a quarter by the training, and lies on its side."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, size in enumerate([(36, 30), (30, 90), (17, 25), (32, 32)]):
        write_images(folder / str(number), 1, seed=number, size=size)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(*write_images(folder, 1, size=(180, 130))).save(folder / "large.jpg", exif=exif)
    (folder / "000.png").unlink()
    return folder


@pytest.fixture(scope="module")
def exported(finished_run, photographs, tmp_path_factory):
    """-> (checkpoint of a run with --resize pad, its ONNX file), exported once: it takes seconds."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = checkpoint_with_resize(finished_run, folder / "best.pth", "pad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_custom, "resnet50", thin_resnet50)
        assert run_export(checkpoint, folder / "model.onnx", "--check", photographs) == 0
    return checkpoint, folder / "model.onnx"


def test_an_onnx_file_predicts_batches_of_any_sides_and_describes_itself(exported, finished_run):
    checkpoint, path = exported
    session = onnxruntime.InferenceSession(path)
    grader = load(checkpoint, "cpu")
    for shape in [(1, 1, 1, 3), (1, 7, 1, 3), (1, 33, 80, 3), (3, 80, 33, 3), (2, 32, 32, 3)]:
        images = np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)
        (probabilities,) = session.run(None, {"images": images})
        assert np.abs(probabilities - grader.probabilities_of(list(images), precise=True)).max() < 1e-6, shape
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == CLASSES and metadata["resize"] == "pad"
    assert metadata["opset"] == str(onnx.load(path).opset_import[0].version) == "18"
    assert str(ROOT).encode() not in path.read_bytes()  # nothing of this machine is in it


def test_the_example_predicts_without_torch(exported, photographs):
    checkpoint, path = exported
    paths = sorted(map(str, photographs.rglob("*.*")))
    words = [str(ROOT / "docs" / "onnx_example.py"), str(path), *paths]
    script = (
        f"import runpy, sys; sys.argv = {words!r}; runpy.run_path(sys.argv[0]); "
        "print([name for name in ('torch', 'portable') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    *lines, imported = process.stdout.splitlines()
    assert imported == "[]" and not process.stderr
    predictions = load(checkpoint, "cpu")(paths)
    for line, prediction in zip(lines, predictions, strict=True):
        assert line.startswith(f"{prediction.path}: {prediction.prediction} (")
        numbers = [float(item.split()[-1]) for item in line.split("(")[-1].rstrip(")").split(", ")]
        assert numbers == pytest.approx(prediction.probabilities, abs=2e-6)


def test_the_example_without_photographs_says_how_it_is_called():
    words = [sys.executable, str(ROOT / "docs" / "onnx_example.py"), "model.onnx"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 1 and process.stderr == "usage: python onnx_example.py model.onnx PHOTO...\n"


def test_a_pt2_file_holds_the_adjusted_model(copied_run, photographs, tmp_path, monkeypatch, capsys):
    checkpoint = checkpoint_with_resize(copied_run, copied_run / "crop.pth", "crop")
    path = tmp_path / "model.pt2"
    assert run_export(checkpoint, path, "--adjusted", "--check", photographs) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3 and not err  # nothing of what the exporter prints
    assert "another class for 0 of 5 photographs" in out
    extra = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    metadata = json.loads(extra["metadata.json"])
    assert json.loads(metadata["adjusted"]) and json.loads(metadata["metrics"])["test"]["balanced_acc"] > 0
    images = np.random.default_rng(0).integers(0, 256, (1, 80, 33, 3), dtype=np.uint8)
    expected = load(checkpoint, "cpu", adjusted=True).probabilities_of([images[0]], precise=True)
    assert module(torch.from_numpy(images)).numpy() == pytest.approx(expected, abs=1e-6)
    assert str(ROOT).encode() not in path.read_bytes()
    Image.fromarray(images[0]).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    document = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", document, re.S) if "torch.export.load" in code]
    exec(code, {})
    assert capsys.readouterr().out.split()[0] in CLASSES


def test_photographs_that_cannot_be_read_are_listed_and_the_status_is_1(finished_run, tmp_path, capsys):
    write_images(tmp_path / "new", 2)
    (tmp_path / "new" / "000.png").write_bytes(b"<!doctype html><html>")
    words = finished_run, tmp_path / "w.safetensors", "--check", tmp_path / "new", "--overwrite"
    assert run_export(*words) == 1
    out, _ = capsys.readouterr()
    assert "1 of 2 photographs cannot be read:\n" in out and "of 1 photographs" in out
    assert "000.png: " in out and "an HTML page" in out
    (tmp_path / "new" / "001.png").write_bytes(b"")
    assert run_export(*words) == 1
    assert "nothing was compared" in capsys.readouterr().err


def test_a_file_that_predicts_something_else_fails_the_check(finished_run, tmp_path, monkeypatch, capsys):
    photographs = write_images(tmp_path / "new", 1, size=(90, 70))

    def without_antialiasing(images, size, resize):
        return torch.nn.functional.interpolate(images.permute(0, 3, 1, 2).float(), (size, size))

    monkeypatch.setattr(portable, "square_as_pillow", without_antialiasing)
    assert run_export(finished_run, tmp_path / "w.safetensors", "--check", *photographs) == 1
    assert "does not predict what predict.py does" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.h5"], "must end in .onnx, .pt2 or .safetensors"),
        (["old.onnx"], "old.onnx already exists"),
        (["nowhere/model.onnx"], "OUTPUT: the folder nowhere does not exist; create it"),
        (["folder.pt2", "--overwrite"], "is a folder; name a file"),
        (["pipe.pt2", "--overwrite"], "is not a regular file"),
        (["w.safetensors", "--adjusted"], "holds the weights alone"),
        (["model.onnx", "--check", "nowhere"], "--check: nowhere does not exist"),
        (["model.pt2", "--check", "empty"], "--check: no photographs in empty"),
    ],
)
def test_mistakes_are_one_line(finished_run, tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.onnx").write_bytes(b"old")
    (tmp_path / "folder.pt2").mkdir()
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.pt2")
    assert run_export(finished_run, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder.pt2", "old.onnx", "pipe.pt2"]


def test_models_that_cannot_be_exported(finished_run, tmp_path, capsys):
    unfitted = changed_checkpoint(finished_run, tmp_path / "unfitted.pth", posthoc=None)
    for fold in ("fold_0", "fold_1"):
        (tmp_path / "cv" / fold).mkdir(parents=True)
        (tmp_path / "cv" / fold / BEST).symlink_to(finished_run / BEST if fold == "fold_0" else unfitted)
    for model, reason in [(unfitted, "has no tau and temperature"), (tmp_path / "cv", "holds 2 models")]:
        assert run_export(model, tmp_path / "model.pt2", "--adjusted") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["m.onnx"], ["onnx", "onnxscript"]),
        (["m.onnx", "--check", "."], ["onnxruntime"]),
        (["m.safetensors"], ["safetensors"]),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, capsys, words, missing):
    monkeypatch.chdir(tmp_path)
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    assert run_export("runs/x", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"pip install {' '.join(missing)}")


def test_an_exporter_that_fails_is_one_line_and_keeps_the_previous_file(finished_run, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        print("a page of chatter")
        raise RuntimeError("no such operator\nand a page of details")

    monkeypatch.setattr(torch.onnx, "export", fail)
    (tmp_path / "model.onnx").write_bytes(b"previous")
    assert run_export(finished_run, tmp_path / "model.onnx", "--overwrite") == 2
    out, err = capsys.readouterr()
    assert err == "error: onnx: the export failed: RuntimeError: no such operator\n" and not out
    assert (tmp_path / "model.onnx").read_bytes() == b"previous"


def test_ctrl_c_while_exporting_leaves_the_previous_file(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(portable, "portable_bytes", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    (tmp_path / "model.onnx").write_bytes(b"previous")
    assert run_export(finished_run, tmp_path / "model.onnx", "--overwrite") == 128 + signal.SIGINT
    assert capsys.readouterr().err == f"stopped; {tmp_path / 'model.onnx'} was not written\n"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"previous"]


def test_huge_photographs_are_not_resized_from_their_full_size(
    finished_run, photographs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export, "MAX_FULL_PIXELS", 100 * 100)
    assert run_export(finished_run, tmp_path / "w.safetensors", "--check", photographs) == 0
    _, checked, full = capsys.readouterr().out.splitlines()
    assert checked.endswith("of 5 photographs") and full.endswith("of 4 photographs")
