import io
import json

import numpy as np
import pytest
from conftest import run_main, write_class_folders, write_images
from PIL import Image

from dataset_double import ImageIndex
from files import UserError
from leaks import check_groups, groups_of, near_duplicates, warn_of_grouped_names


def test_groups_are_what_the_parenthesis_matches_in_the_file_name():
    paths = ["/7_a/01_left.jpg", "/7_a/02_left.jpg", "/7_b/01_right.jpg"]
    assert groups_of(paths, r"^(\d+)_").tolist() == [0, 1, 0]
    assert groups_of(paths, r"left|right").tolist() == [0, 0, 1]
    with pytest.raises(UserError, match=r"--group_regex: .* finds nobody in the name of /7_b/01_right.jpg"):
        groups_of(paths, "left")


def test_a_group_in_two_parts_is_an_error():
    one, other = (ImageIndex([path], np.array([0]), ["a"]) for path in ("/x/p1_a.png", "/y/p1_b.png"))
    with pytest.raises(UserError, match=r"group 'p1' is in two parts: /x/p1_a.png \(train\) and /y/p1_b.png"):
        check_groups({"train": one, "val": other}, r"^(p\d)")


@pytest.mark.parametrize(
    "names, looks_grouped",
    [
        ([f"{i:04d}_{side}.jpg" for i in range(20) for side in "LR"], True),
        ([f"site-{i:04d}-{side}.jpg" for i in range(20) for side in "LR"], True),
        ([f"HAM_{i:07d}_ISIC_{i * 7:07d}.jpg" for i in range(40)], False),
        ([f"img_{i}.jpg" for i in range(40)], False),
        ([f"{i}.jpg" for i in range(40)], False),
        ([f"grade{i % 5}_{i}.jpg" for i in range(400)], False),
    ],
)
def test_names_that_look_grouped_are_told(names, looks_grouped, capsys):
    warn_of_grouped_names(names)
    assert ("--group_regex" in capsys.readouterr().out) == looks_grouped


def smooth_images(count):
    """Different images, as smooth as skin. -> (count, 64, 64, 3) uint8"""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 220, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in coarse])


def compressed(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=40)
    return np.array(Image.open(buffer))


ALTERATIONS = {
    "the same": lambda image: image,
    "compressed": compressed,
    "smaller": lambda image: np.array(Image.fromarray(image).resize((40, 40)).resize((64, 64))),
    "brighter": lambda image: np.clip(image * 1.1 + 5, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_near_duplicates_in_other_parts_are_found_and_no_others(name):
    pixels = smooth_images(300)
    pixels = np.concatenate([pixels, [ALTERATIONS[name](pixels[0]), ALTERATIONS[name](pixels[1])]])
    of_part = np.zeros(302, int)
    of_part[300] = 1  # the copy of image 1 is in its own part, where it does no harm
    assert near_duplicates(pixels, np.arange(302), of_part) == [(0, 300)]


def test_images_of_one_colour_are_no_near_duplicates():
    pixels = np.concatenate([np.full((1, 64, 64, 3), 199, np.uint8), smooth_images(5)])
    rows = np.array([0] * 20_000 + [3, 4, 3])
    assert near_duplicates(pixels, rows, np.arange(20_003)) == [(20_000, 20_002)]
    assert near_duplicates(pixels, rows[:20_000], np.arange(20_000)) == []


def test_a_run_lists_photographs_that_are_in_two_parts(tmp_path, capsys, thin_network):
    data = write_class_folders(tmp_path / "train")
    tests = write_class_folders(tmp_path / "test", seed=5)
    (tests / "0" / "stolen.png").write_bytes((data / "0" / "003.png").read_bytes())
    flags = ["--image_size", 32, "--batch_size", 8, "--epochs", 1, "--no-pretrained", "--split", 0.9, 0.1, 0]
    assert run_main("--data_dirs", data, "--test_dirs", tests, *flags, "--run_dir", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert f"{tests}/0/stolen.png (test)" in out and "1 pairs of photographs in different parts" in out


def test_no_person_is_in_two_parts(tmp_path, capsys, thin_network):
    for grade, count in {"0": 30, "1": 20}.items():
        for number, path in enumerate(write_images(tmp_path / "data" / grade, count, (90, 90 + 60 * int(grade), 90))):
            path.rename(path.with_name(f"{number // 2:03d}_{'LR'[number % 2]}.png"))
    flags = ["--image_size", 32, "--batch_size", 8, "--epochs", 1, "--no-pretrained", "--data_dirs", tmp_path / "data"]
    assert run_main(*flags, "--group_regex", r"^(\d+)_", "--run_dir", tmp_path / "run") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("groups")]
    assert sum(map(int, line.split()[1:])) == 15
    assert run_main("--resume", tmp_path / "run" / "last_model.pth", "--group_regex", "x") == 2
    assert "--group_regex: stays what it was" in capsys.readouterr().err
    flags = ["--eval_only", "--resume", tmp_path / "run" / "best_model.pth"]
    assert run_main(*flags, "--run_dir", tmp_path / "persons") == 0
    assert run_main(*flags, "--group_regex", "x", "--run_dir", tmp_path / "other") == 2
    assert "--group_regex: stays what it was" in capsys.readouterr().err
    # the persons of other images are read from their names, those of the own validation images as in the training
    flags += ["--test_dirs", write_class_folders(tmp_path / "elsewhere", {"0": 9, "1": 9}, seed=7)]
    assert run_main(*flags, "--run_dir", tmp_path / "other") == 2
    assert "finds nobody in the name of" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert run_main(*flags, "--group_regex", r"^(\d)", "--run_dir", tmp_path / "one") == 0
    assert run_main(*flags, "--group_regex", "", "--run_dir", tmp_path / "images") == 0
    run, persons, one, images = (
        json.loads((tmp_path / of / "results.json").read_text()) for of in ("run", "persons", "one", "images")
    )
    assert persons["test"] == run["test"] and run["val"] == persons["val"] == one["val"] == images["val"]
    assert one["test"]["nll"] == images["test"]["nll"] and one["test"]["nll_ci"] != images["test"]["nll_ci"]
