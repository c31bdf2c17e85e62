"""Images found by their names in a table: with and without folders and extensions."""

import time
import unicodedata

import numpy as np
import pytest

from images.folders import Paths
from images.names import AMBIGUOUS, MISSING, match_names, similar_name


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("1.jpg", AMBIGUOUS),
        ("x/1.jpg", 0),
        ("x/1", 0),
        ("./y/1.jpg", 1),
        ("photos/y/1.jpg", 1),
        ("/elsewhere/photos/x/1.jpg", 0),  # of another computer
        ("C:\\photos\\y\\1.jpg", 1),
        ("z/1.jpg", MISSING),
        ("z/2.jpg", 2),  # all images of that folder are in `photos`
        ("y/3.jpg", MISSING),  # it is in another folder
        ("ab", 4),
        ("", MISSING),
        ("가.jpg", 5),
    ],
)
def test_folders_in_a_table_must_be_those_of_the_image(cell, expected):
    files = ["x/1.jpg", "y/1.jpg", "2.jpg", "x/3.jpg", "ab.jpeg", unicodedata.normalize("NFD", "가.jpg")]
    found, twins = match_names([cell], [f"/data/photos/{name}" for name in files], ["/data/photos"])
    assert found.tolist() == [expected] and (expected != AMBIGUOUS or twins == {0: (0, 1)})


def test_of_several_data_folders_the_path_below_its_own_counts():
    paths = ["/data/a/x/1.jpg", "/data/b/x/1.jpg", "/data/b/1.jpg", "/data/b/y/x/1.jpg"]
    found, twins = match_names(["x/1.jpg", "b/x/1", "./1.jpg", "y/x/1.jpg"], paths, ["/data/a", "/data/b"])
    assert found.tolist() == [AMBIGUOUS, 1, 2, 3] and twins == {0: (0, 1)}


def test_a_million_rows_are_matched_in_seconds():
    paths = Paths(f"/data/photos/{i % 1000}/img_{i:07d}.jpg" for i in range(200_000))
    cells = [f"img_{i:07d}" for i in range(200_000)]
    start = time.process_time()
    found, _ = match_names(cells, paths, ["/data/photos"])
    assert np.array_equal(found, np.arange(200_000)) and time.process_time() - start < 2


def test_the_time_does_not_grow_with_the_square_of_images_that_have_the_same_name():
    names = [f"patient_{i}/left/front" for i in range(5_000)]
    paths = [f"/data/photos/{name}.jpg" for name in names]
    for cells in (names, [f"D:\\{name}.jpg" for name in names], [f"photos/{name}" for name in names]):
        start = time.process_time()
        found, _ = match_names(cells, paths, ["/data/photos"])
        assert np.array_equal(found, np.arange(5_000)) and time.process_time() - start < 2


def test_an_image_of_another_extension_or_case_is_named():
    paths = ["x/a.PNG", "y/Bc.jpg", "1.jpg"]
    for cell, found in (("a.jpg", "a.PNG"), ("q/bc", "Bc.jpg"), ("BC.jpg", "Bc.jpg"), ("1.0", "1.jpg")):
        assert f"(but there is {found}: " in similar_name(["z", cell], paths)
    assert similar_name(["z", "", "other/a"], paths) == ""  # the latter is in another folder
