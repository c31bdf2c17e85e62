"""The model as one graph: the resize of the training to the bit, the adjustment, the metadata."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from safetensors import safe_open

import portable
from calibration import adjust
from images.decode import to_square
from model import Model
from portable import PortableModel, describe, open_portable, portable_bytes, square_as_pillow
from run.files import write_json

# smaller than the square, of one pixel, odd, wide, tall, and just as tall as Pillow's change of order
SIDES = [(1, 1), (1, 40), (70, 1), (7, 9), (32, 32), (31, 33), (45, 101), (101, 45), (300, 64), (64, 300), (97, 64)]
COUNTS = [90, 9, 1]
POSTHOC = {"tau": 0.5, "temperature": 0.7}


def noise(height, width):
    return np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)


def small_model(**options):
    torch.manual_seed(0)
    return PortableModel(Model(3).eval(), 32, "stretch", **options)


def checkpoint_of(**changes):
    content = {"classes": ["0", "<b>", "주름 3"], "samples_per_cls": COUNTS, "epoch": 4, "posthoc": POSTHOC}
    return {**content, **changes}


ARGS = argparse.Namespace(image_size=32, resize="pad", train_loss="cb", ordinal=True)


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_the_resize_has_the_bits_of_pillow(resize):
    for height, width in SIDES:
        for size in (32, 45):
            pixels = noise(height, width)
            expected = np.asarray(to_square(Image.fromarray(pixels), size, resize))
            square = square_as_pillow(torch.from_numpy(pixels)[None], size, resize)[0].permute(1, 2, 0).numpy()
            assert (square == expected).all(), (height, width, size)


def test_the_resize_has_the_bits_of_a_pillow_that_always_begins_horizontally(monkeypatch):
    monkeypatch.setattr(portable, "HAS_VERTICAL_FIRST", False)
    pixels = noise(120, 40)
    image, bilinear = Image.fromarray(pixels), Image.Resampling.BILINEAR
    expected = np.asarray(image.resize((32, 120), bilinear).resize((32, 32), bilinear))
    square = square_as_pillow(torch.from_numpy(pixels)[None], 32, "stretch")[0].permute(1, 2, 0).numpy()
    assert (square == expected).all()
    if portable.PIL.__version__ >= "13":
        assert (square != np.asarray(to_square(image, 32, "stretch"))).any()


def test_pad_rounds_the_shorter_side_as_python_does():
    """Half a pixel is rounded to the even number, of a product that is not exact itself."""
    for width in range(1, 81):
        pixels = np.full((80, width, 3), 255, np.uint8)
        expected = np.asarray(to_square(Image.fromarray(pixels), 56, "pad"))
        square = square_as_pillow(torch.from_numpy(pixels)[None], 56, "pad")[0].permute(1, 2, 0).numpy()
        assert (square == expected).all(), width


def test_the_output_is_the_softmax_of_the_network(thin_network):
    model, images = small_model(), np.stack([noise(50, 40), noise(40, 50).transpose(1, 0, 2)])
    squares = np.stack([np.asarray(to_square(Image.fromarray(image), 32, "stretch")) for image in images])
    with torch.inference_mode():
        expected = model.network(torch.from_numpy(squares).permute(0, 3, 1, 2)).softmax(dim=1)
        assert torch.allclose(model(torch.from_numpy(images)), expected, atol=1e-6)


def test_the_adjustment_is_that_of_calibration(thin_network):
    images = torch.from_numpy(noise(50, 40))[None]
    with torch.inference_mode():
        plain = small_model()(images).numpy()
        adjusted = small_model(posthoc=POSTHOC, samples_per_cls=COUNTS)(images).numpy()
    assert np.abs(adjusted - plain).max() > 0.1
    assert adjusted == pytest.approx(adjust(plain, COUNTS, **POSTHOC), abs=1e-6)


def test_metadata_are_texts_with_the_metrics_of_the_same_epoch(tmp_path):
    results = {"evaluated_epoch": 4, "classes": ["0", "<b>", "주름 3"], "posthoc": {**POSTHOC, "test": {"acc": 0.8}}}
    results["test"] = {"acc": 0.7, "acc_ci": [0.6, 0.8], "per_class": {}, "confusion_matrix": [[1]]}
    write_json(tmp_path / "results.json", results)
    metadata = describe(checkpoint_of(), ARGS, tmp_path, is_adjusted=False)
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["classes"]) == ["0", "<b>", "주름 3"] and "주름" in metadata["classes"]
    assert json.loads(metadata["samples_per_cls"]) == COUNTS and json.loads(metadata["ordinal"]) is True
    assert (metadata["image_size"], metadata["resize"], metadata["temperature"]) == ("32", "pad", "0.7")
    assert json.loads(metadata["metrics"]) == {"test": {"acc": 0.7, "acc_ci": [0.6, 0.8]}}
    assert json.loads(describe(checkpoint_of(), ARGS, tmp_path, True)["metrics"]) == {"test": {"acc": 0.8}}
    assert describe(checkpoint_of(epoch=3), ARGS, tmp_path, False)["metrics"] == "{}"


def test_class_names_that_are_not_utf8_survive_in_metadata_that_are(tmp_path):
    names = ["0", "b\udcff", "\\udcff"]
    text = describe({**checkpoint_of(), "classes": names}, ARGS, tmp_path, False)["classes"]
    assert json.loads(text.encode("utf-8")) == names


@pytest.mark.parametrize("content", ["{", "[]", '{"evaluated_epoch": 4}', '{"evaluated_epoch": 4, "test": 3}'])
def test_damaged_results_cost_only_the_metrics(tmp_path, capsys, content):
    (tmp_path / "results.json").write_text(content)
    assert describe(checkpoint_of(posthoc=None), ARGS, tmp_path, False)["metrics"] == "{}"
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("cosine_head", [False, True])
def test_weights_are_loaded_as_the_documents_say(thin_network, tmp_path, monkeypatch, cosine_head):
    monkeypatch.chdir(tmp_path)
    model = PortableModel(Model(3, cosine_head=cosine_head).eval(), 32, "stretch")
    args = argparse.Namespace(**{**vars(ARGS), "train_loss": "ldam" if cosine_head else "cb"})
    metadata = describe(checkpoint_of(), args, tmp_path, False)
    (tmp_path / "weights.safetensors").write_bytes(portable_bytes(model, metadata, ".safetensors"))
    with safe_open("weights.safetensors", "pt") as file:
        assert file.metadata() == metadata
    document = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", document, re.S) if "safetensors" in code]
    names = {}
    exec(code, names)
    images = torch.from_numpy(noise(32, 32))[None]
    with torch.inference_mode():
        probabilities = names["network"](images.permute(0, 3, 1, 2)).softmax(dim=1)
        assert torch.allclose(probabilities, model(images), atol=1e-6)
        assert np.allclose(open_portable("weights.safetensors", model)(images.numpy()), model(images), atol=1e-6)
