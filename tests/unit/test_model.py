"""The classifier, initial weights, and checkpoint files that are intact, cut short or malicious."""

import pickle

import pytest
import torch
import torchvision
from torchvision.transforms.v2.functional import normalize

from flags import SPLITS
from model import (
    CHECKPOINT_TYPES,
    CosineHead,
    Model,
    backbone_state_dict,
    load_checkpoint,
    read_weights,
    save_checkpoint,
)
from run.cli import UserError


def checkpoint_with(**content):
    """A checkpoint with this content, and with empty values under all other keys."""
    kinds = {key: kind[0] if isinstance(kind, tuple) else kind for key, kind in CHECKPOINT_TYPES.items()}
    nested = {
        "rng_state": {"cpu": torch.get_rng_state(), "cuda": []},
        "splits": {split: [] for split in SPLITS},
        "file_sizes": {split: torch.zeros(0) for split in SPLITS},
    }
    return {**{key: kind() for key, kind in kinds.items()}, **nested, **content}


def save(path, **content):
    save_checkpoint(path, checkpoint_with(**content))


def test_model_normalises_bytes_as_torchvision_does():
    model = Model(3).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalized = normalize(images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        torch.testing.assert_close(model(images), model(normalized))


def test_all_of_torchvisions_weights_but_the_head_are_loaded(tmp_path):
    theirs = torchvision.models.resnet50().state_dict()
    torch.save(theirs, tmp_path / "resnet50.pth")
    state_dict, classes = read_weights(tmp_path / "resnet50.pth")
    model = Model(3)
    head = model.head.weight.clone()
    model.load_initial_weights(state_dict, classes, ["a", "b", "c"])
    ours = model.state_dict()
    assert all(torch.equal(ours[f"backbone.{name}"], value) for name, value in theirs.items() if name[:3] != "fc.")
    assert torch.equal(model.head.weight, head)


def test_older_files_of_torchvision_without_batch_counts_are_loaded_too(tmp_path):
    old = {k: v for k, v in torchvision.models.resnet50().state_dict().items() if "num_batches_tracked" not in k}
    torch.save(old, tmp_path / "resnet50.pth")
    model = Model(3)
    model.load_initial_weights(*read_weights(tmp_path / "resnet50.pth"), ["a", "b", "c"])
    assert torch.equal(model.backbone.bn1.weight, old["bn1.weight"])


@pytest.mark.parametrize("classes, is_loaded", [(["a", "b"], True), (["a", "c"], False), (["a", "b", "c"], False)])
def test_the_head_of_a_checkpoint_is_loaded_only_for_the_same_classes(tmp_path, classes, is_loaded):
    trained = Model(2)
    save(tmp_path / "m.pth", model_state_dict=trained.state_dict(), classes=["a", "b"])
    model = Model(len(classes))
    model.load_initial_weights(*read_weights(tmp_path / "m.pth"), classes)
    assert torch.equal(model.backbone.conv1.weight, trained.backbone.conv1.weight)
    assert torch.equal(model.head.weight, trained.head.weight) is is_loaded


def test_the_head_of_a_checkpoint_is_not_loaded_into_a_head_of_another_kind(tmp_path):
    trained, classes = Model(2), ["a", "b"]
    save(tmp_path / "m.pth", model_state_dict=trained.state_dict(), classes=classes)
    model = Model(2, cosine_head=True)
    head = model.head.weight.clone()
    model.load_initial_weights(*read_weights(tmp_path / "m.pth"), classes)
    assert torch.equal(model.backbone.conv1.weight, trained.backbone.conv1.weight)
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("content", [{"a": torch.zeros(1)}, [1, 2], {"conv1.weight": torch.zeros(64, 3, 7, 7)}])
def test_files_without_the_weights_of_a_resnet50_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"--weights: .*other\.pth"):
        read_weights(tmp_path / "other.pth")


def test_dropout_is_active_only_in_training():
    model, images = Model(2, dropout_prob=0.9), torch.randn(2, 3, 32, 32)
    model.eval()
    assert torch.equal(model(images), model(images))
    model.dropout.train()
    assert not torch.equal(model(images), model(images))


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    splits = {"train": ["a b.jpg"], "val": [], "test": []}
    sizes = {split: torch.full((len(paths),), 7) for split, paths in splits.items()}
    checkpoint = checkpoint_with(epoch=3, classes=["0", "주름"], splits=splits, file_sizes=sizes, best_metric=0.5)
    save_checkpoint(tmp_path / "last.pth", checkpoint)
    again = load_checkpoint(tmp_path / "last.pth")
    assert again["file_sizes"]["train"].tolist() == [7]
    torch.testing.assert_close(again.pop("rng_state")["cpu"], checkpoint.pop("rng_state")["cpu"])
    assert {**again, "file_sizes": None} == {**checkpoint, "file_sizes": None}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]


def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path):
    save(tmp_path / "last.pth", model_state_dict=Model(2).head.state_dict())
    whole = (tmp_path / "last.pth").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.pth"):
            load_checkpoint(tmp_path / "cut.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    (tmp_path / "attack.pth").write_bytes(pickle.dumps(Attack()))
    torch.save({"epoch": Attack()}, tmp_path / "attack2.pth")
    for name in ("attack.pth", "attack2.pth"):
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "touched").exists()


def test_the_names_of_the_backbone_include_no_head():
    assert list(backbone_state_dict({"conv1.weight": 1, "fc.weight": 2})) == ["backbone.conv1.weight"]


def test_the_cosine_head_alone_learns_at_the_default_learning_rate():
    torch.manual_seed(0)
    head, targets = CosineHead(512, 4), torch.arange(200) % 4
    features = torch.randn(4, 512)[targets] + torch.randn(200, 512)
    logits = head(features)
    torch.testing.assert_close(logits / 30, torch.cosine_similarity(features[:, None], head.weight[None], dim=2))
    assert head(features.bfloat16()).dtype == torch.float32
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), targets).backward()
        optimizer.step()
    assert (head(features).argmax(1) == targets).float().mean() > 0.95
