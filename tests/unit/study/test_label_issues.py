"""Label doubts: which labels are doubtful, and the file that lists them."""

import numpy as np

from run.files import read_rows
from study.label_issues import COLUMNS, find_label_issues, write_label_issues
from study.out_of_fold import OutOfFold


def test_wrong_labels_are_found_and_the_least_probable_comes_first():
    """A model that is right in most cases, and labels of which some have been changed."""
    rng = np.random.default_rng(0)
    truth = rng.integers(4, size=2000)
    logits = rng.normal(size=(2000, 4)) + 3 * np.eye(4)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    is_wrong = rng.random(2000) < 0.05
    labels = np.where(is_wrong, (truth + rng.integers(1, 4, 2000)) % 4, truth)
    doubtful = find_label_issues(labels, probabilities)
    assert is_wrong[doubtful[:50]].mean() > 0.9  # of labels drawn at random, 5 % would be wrong
    of_label = probabilities[doubtful, labels[doubtful]]
    assert (np.diff(of_label) >= 0).all()
    assert not set(doubtful) & set(np.flatnonzero(probabilities.argmax(axis=1) == labels))


def test_the_threshold_of_a_class_is_its_mean_probability_among_the_images_with_that_label():
    """Confident learning: a class that the model favors needs a larger probability than one it rarely predicts."""
    labels = np.array([0, 0, 1, 1, 0, 1])
    probability_of_1 = np.array([0.1, 0.1, 0.9, 0.9, 0.6, 0.9])  # its mean over the images labeled 1 is 0.9
    probabilities = np.stack([1 - probability_of_1, probability_of_1], axis=1)
    assert len(find_label_issues(labels, probabilities)) == 0  # 0.6 for class 1 is less than usual
    probabilities[4] = 0.05, 0.95
    assert find_label_issues(labels, probabilities).tolist() == [4]


def test_a_class_without_images_gives_no_doubts():
    assert len(find_label_issues(np.array([0, 0]), np.array([[0.1, 0.9], [0.9, 0.1]]))) == 0


def test_no_images_and_images_that_are_all_alike():
    assert len(find_label_issues(np.array([], int), np.zeros((0, 3)))) == 0
    assert find_label_issues(np.array([0, 1, 0]), np.full((3, 2), [0.25, 0.75])).tolist() == [0, 2]


def test_the_file_names_label_and_answer_with_their_probabilities(tmp_path):
    paths = np.array(["/photos/주름, 1.jpg", "/photos/2.jpg"], object)
    images = OutOfFold(["정상", "<b>"], paths, np.array([0, 1]), np.array([[0.125, 0.875], [0.75, 0.25]]))
    write_label_issues(tmp_path / "issues.csv", images, [1, 0])
    rows = read_rows(tmp_path / "issues.csv")
    assert tuple(rows[0]) == COLUMNS
    assert list(rows[1].values()) == ["/photos/주름, 1.jpg", "정상", "0.125", "<b>", "0.875", "2"]
    assert rows[0]["rank"] == "1"
