"""The network is torchvision's except for one stride, and its ImageNet weights come from the cache or the network."""

import email.message
import io
import os
import re
import urllib.error
import urllib.response

import pytest
import torch
import torchvision

import resnet_custom
from run.cli import UserError


@pytest.fixture(scope="module")
def networks():
    """Ours with a last stride of 2, and torchvision's, with the same weights."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = resnet_custom.resnet50(last_stride=2).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_a_last_stride_of_two_gives_torchvisions_network_bit_for_bit(networks):
    ours, theirs = networks
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))


def test_state_dict_has_torchvisions_names_and_shapes():
    expected = {name: tensor.shape for name, tensor in torchvision.models.resnet50().state_dict().items()}
    assert {name: tensor.shape for name, tensor in resnet_custom.resnet50().state_dict().items()} == expected


def test_with_zero_init_each_block_starts_as_the_identity():
    networks = []
    for zero_init in (False, True):
        torch.manual_seed(0)
        networks.append(resnet_custom.resnet50(zero_init=zero_init))
    plain, zero = (network.state_dict() for network in networks)
    assert {name for name in plain if not torch.equal(plain[name], zero[name])} == {
        name for name in plain if name.endswith("bn3.weight")
    }
    features = torch.rand(1, 256, 4, 4)
    with torch.inference_mode():
        assert torch.equal(networks[1].layer1[1](features), features)


def test_a_photograph_of_224_px_gives_features_of_14_x_14_x_2048():
    network = resnet_custom.resnet50().eval()
    shapes = []
    network.layer4.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224))
    assert shapes == [(1, 2048, 14, 14)]


def test_without_network_and_file_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", no_network)
    with pytest.raises(UserError, match="--weights FILE") as caught:
        resnet_custom.imagenet_state_dict()
    assert "--no-pretrained" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_downloaded_for_one_run_where_they_cannot_be_kept(monkeypatch, tmp_path, networks, capsys):
    """A container whose user has no home folder."""
    source = tmp_path / "weights.pth"
    torch.save(networks[1].state_dict(), source)
    monkeypatch.setenv("TORCH_HOME", os.devnull)
    monkeypatch.setattr(
        "urllib.request.OpenerDirector.open",
        lambda *args, **kwargs: urllib.response.addinfourl(
            io.BytesIO(source.read_bytes()), email.message.Message(), ""
        ),
    )
    monkeypatch.setattr("torch.hub.HASH_REGEX", re.compile("(?!)"))  # the name has the hash of other weights
    state_dict = resnet_custom.imagenet_state_dict()
    assert torch.equal(state_dict["fc.weight"], networks[1].state_dict()["fc.weight"])
    assert "for this run only" in capsys.readouterr().out


def test_imagenet_weights_in_the_cache_need_no_network(monkeypatch, tmp_path, networks):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", None)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    name = resnet_custom.IMAGENET_WEIGHTS.url.rsplit("/", 1)[1]
    torch.save(networks[1].state_dict(), tmp_path / "hub" / "checkpoints" / name)
    loaded = resnet_custom.imagenet_state_dict()
    assert torch.equal(loaded["conv1.weight"], networks[1].state_dict()["conv1.weight"])
