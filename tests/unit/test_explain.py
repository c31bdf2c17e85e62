"""Heat maps, checked against what Grad-CAM is for this network, and what they leave untouched."""

import numpy as np
import pytest
import torch

from explain import CHUNK_PIXELS, grad_cam, overlay
from model import CosineHead, Model


def random_images(count, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture
def model(thin_network):
    torch.manual_seed(0)
    return Model(3).eval()


@torch.inference_mode()
def features_of(model, images):
    """-> (N, K, h, w), the output of layer4"""
    kept = []
    hook = model.backbone.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output.clone()))
    model(images)
    hook.remove()
    return kept[0]


def test_with_average_pooling_and_a_linear_head_the_map_is_the_class_activation_map(model):
    """Selvaraju et al. 2017, sec. 3.1: Grad-CAM generalizes CAM, the features weighted by the head's weights."""
    images, targets = random_images(3), [0, 2, 1]
    cam = torch.einsum("nkhw,nk->nhw", features_of(model, images), model.head.weight[targets].detach()).relu()
    maps = grad_cam(model, images, targets)
    assert maps.shape == (3, 64, 64) and maps.dtype == np.float32
    cam /= cam.amax(dim=(1, 2), keepdim=True)
    np.testing.assert_allclose(maps[:, ::16, ::16], cam, rtol=1e-4, atol=1e-6)  # 4 x 4 cells
    assert maps.max() == pytest.approx(1)


def test_cells_of_the_features_are_laid_where_they_look(model):
    """Cell i is centered at pixel 16 i: the gradient of its features reaches equally far to both sides."""
    images = random_images(4, 256).float().requires_grad_()
    kept = []
    hook = model.backbone.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(images)
    hook.remove()
    assert kept[0].shape[2:] == (16, 16)
    kept[0][:, :, 8, 8].sum().backward()
    rows, columns = images.grad.abs().sum(dim=(0, 1)).nonzero(as_tuple=True)
    for reached in (rows, columns):
        assert (reached.min() + reached.max()).item() / 2 == pytest.approx(16 * 8, abs=1)


def state(model):
    modules = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return modules, [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]


@pytest.mark.parametrize("prepare", [Model.train, Model.eval, Model.freeze_backbone])
def test_the_model_is_left_as_it_was_even_if_a_map_fails(model, prepare):
    prepare(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = state(model)
    grad_cam(model, random_images(1), [1])
    assert state(model) == before
    with pytest.raises(Exception, match="out of bounds"):
        grad_cam(model, random_images(1), [9])
    assert state(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_surroundings_and_mode_do_not_change_the_map(model):
    expected = grad_cam(model, random_images(2), [0, 1])
    model.train()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(grad_cam(model, random_images(2), [0, 1]), expected)


def test_chunks_do_not_change_the_maps(model, monkeypatch):
    images, targets = random_images(5), [0, 1, 2, 0, 1]
    together = grad_cam(model, images, targets)
    assert CHUNK_PIXELS >= 5 * 64 * 64
    monkeypatch.setattr("explain.CHUNK_PIXELS", 2 * 64 * 64)
    np.testing.assert_allclose(grad_cam(model, images, targets), together, atol=1e-5)


def test_a_class_that_nothing_speaks_for_has_a_map_of_zeros(model):
    with torch.no_grad():
        model.head.weight[1] = -1  # the features are not negative
    assert not grad_cam(model, random_images(1), [1]).any()


def test_models_with_a_cosine_head_and_sides_of_any_length_have_maps(thin_network):
    model = Model(3, cosine_head=True)
    assert isinstance(model.head, CosineHead)
    maps = grad_cam(model, random_images(2, size=50), [0, 1])
    assert maps.shape == (2, 50, 50) and np.isfinite(maps).all()


def test_the_overlay_keeps_the_photograph_where_the_map_is_zero():
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    heat = np.zeros((4, 6), np.float32)
    np.testing.assert_array_equal(overlay(photo, heat), photo)
    heat[:, 3:] = 1
    laid = overlay(photo, heat)
    assert laid.shape == photo.shape and laid.dtype == np.uint8
    np.testing.assert_array_equal(laid[:, :20], photo[:, :20])
    assert (laid[:, 40:] != photo[:, 40:]).any(axis=2).all()
