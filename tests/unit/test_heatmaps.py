"""The figures of `--heatmaps`: their names, their texts, and failures that cost nothing else."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import heatmaps
from explain import explain_predictions
from heatmaps import HeatMapFolder, captions, figure, figure_name
from inference import Prediction
from model import Model

GRADES = ["0", "1", "2"]


@pytest.fixture
def model(thin_network):
    torch.manual_seed(0)
    return Model(3).eval()


def random_images(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def predictions_of(*paths, unreadable=()):
    probabilities = np.array([0.2, 0.7, 0.1], np.float32)
    read = [Prediction(str(path), "1", 0.7, probabilities) for path in paths]
    return [Prediction(p.path, error="empty file") if p.path in unreadable else p for p in read]


def files_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_equal_names_of_different_folders_make_different_files(model, tmp_path, capsys):
    folder = HeatMapFolder(tmp_path / "maps", [model], GRADES, is_ordinal=True)
    folder.add(
        random_images(2), predictions_of("a/사진.jpg", "a/broken.jpg", "b/사진.jpg", unreadable=["a/broken.jpg"])
    )
    folder.add(torch.empty(0), predictions_of("c/x.jpg", unreadable=["c/x.jpg"]))
    folder.add(random_images(1), predictions_of("c/사진.png"))
    assert files_in(tmp_path / "maps") == ["000001_사진.png", "000003_사진.png", "000005_사진.png"]
    assert folder.print() == 0
    assert capsys.readouterr().out == f"3 heat maps saved to {tmp_path / 'maps'}\n"
    with Image.open(tmp_path / "maps" / "000001_사진.png") as picture:
        assert picture.mode == "RGB" and picture.width > 3 * heatmaps.PANEL


def test_a_long_name_is_shortened():
    name = figure_name(7, "folder/" + "가" * 80 + ".jpg")
    assert name == "000007_" + "가" * 33 + ".png" and len(os.fsencode(name)) < 143


def test_a_map_that_fails_is_a_line_and_the_next_ones_are_written(model, tmp_path, capsys, monkeypatch):
    folder = HeatMapFolder(tmp_path / "maps", [model], GRADES, is_ordinal=False)
    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.layer4, "forward", None)
        folder.add(random_images(4), predictions_of("a.jpg", "b.jpg", "c.jpg", "d.jpg"))
    (tmp_path / "maps" / "000005_e.png").mkdir()  # cannot be written over
    folder.add(random_images(2), predictions_of("e.jpg", "f.jpg"))
    assert folder.print() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [f"no heat map of {name}.jpg" for name in "abc"]
    assert lines[-1] == f"1 heat maps saved to {tmp_path / 'maps'}; 5 failed"
    assert files_in(tmp_path / "maps") == ["000005_e.png", "000006_f.png"]


def test_only_grades_have_neighbors(model):
    images, probabilities, classes = random_images(1), np.array([[0.1, 0.6, 0.3]]), ["0", "1", "3"]
    (explanations,) = explain_predictions([model], images, probabilities, is_ordinal=True)
    assert [captions(explanation, probabilities[0], classes) for explanation in explanations] == [
        ("1: 60%", "what supports it rather than 0"),
        ("why not 3: 30%", "what supports 3"),
    ]
    ((explanation,),) = explain_predictions([model], images, probabilities, is_ordinal=False)
    assert captions(explanation, probabilities[0], classes) == ("1: 60%", "what supports it")


def test_the_map_of_several_models_is_their_mean(model):
    images, probabilities = random_images(1), np.array([[0.1, 0.6, 0.3]])
    other = Model(3).eval()
    first, second, both = (
        explain_predictions(models, images, probabilities, is_ordinal=False)[0][0].heat_map
        for models in ([model], [other], [model, other])
    )
    mean = (first + second) / 2
    np.testing.assert_allclose(both, mean / mean.max(), atol=1e-6)


@pytest.mark.parametrize("name", ["주름", "x" * 5000, "가" * 5000, "<b>&\t\n", "", "\U0001f600"])
def test_any_class_name_fits_into_the_figure(name):
    photo, heat = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.float32)
    ordinary = figure(photo, [heat], [("a", "b")])
    assert figure(photo, [heat], [(name, name)]).size == ordinary.size


def test_the_scale_has_the_colors_of_the_map(model):
    photo, heat = np.full((32, 32, 3), 128, np.uint8), np.ones((32, 32), np.float32)
    picture = np.asarray(figure(photo, [heat], [("a", "b")])).astype(int)
    top, middle = 2 * heatmaps.LINE + heatmaps.MARGIN, heatmaps.MARGIN + heatmaps.PANEL * 3 // 2
    bar = 3 * heatmaps.MARGIN + 2 * heatmaps.PANEL
    assert np.abs(picture[top + 100, middle] - picture[top, bar]).max() <= 1  # the largest value
    assert np.abs(picture[top + heatmaps.PANEL - 1, bar] - 128).max() <= 1  # zero: the photograph itself
