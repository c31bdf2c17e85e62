"""Images of more than 8 bits."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from images.decode import TOO_DARK, decode, load_image

RAMP = np.linspace(0, 1, 64)[None] * np.ones((64, 1))


def values(bits):
    return np.round(RAMP * (2**bits - 1)).astype(int)


def write_tiff(path, data, bits, order="<", **tags):
    """An uncompressed gray TIFF. data: bytes or (64, 64) array; tags: further ones, as t281=4095"""
    data = data if isinstance(data, bytes) else data.astype(f"{order}u{bits // 8}").tobytes()
    entries = {256: 64, 257: 64, 258: bits, 259: 1, 262: 1, 277: 1, 278: 64, 279: len(data)}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}LH", 8, len(entries))
    for tag, value in sorted(entries.items()):
        is_long = tag in (273, 279, 341)
        out += struct.pack(f"{order}HHL", tag, 4 if is_long else 3, 1)
        out += struct.pack(f"{order}L", value) if is_long else struct.pack(f"{order}HH", value, 0)
    path.write_bytes(out + bytes(4) + data)


def write_png(path, array, significant_bits=()):
    """16 bits per channel. array: (64, 64[, C]) int"""
    array = array.reshape(64, 64, -1)
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]

    def chunk(name, data):
        return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))

    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">LLBBBBB", 64, 64, 16, color_type, 0, 0, 0))
    content += chunk(b"sBIT", bytes(significant_bits)) if significant_bits else b""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def check_ramp(path, channel=0):
    pixels = np.asarray(load_image(path))[..., channel].astype(int)
    assert np.abs(pixels - RAMP * 255).max() <= 1
    assert not decode(path, 32)[1][1] & TOO_DARK


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_a_tiff_of_any_byte_order_and_polarity_has_the_depth_it_states(tmp_path, order, white_is_zero, bits):
    gray = 2**bits - 1 - values(bits) if white_is_zero else values(bits)
    write_tiff(tmp_path / "i.tif", gray, 16, order, t262=int(not white_is_zero), t281=2**bits - 1)
    check_ramp(tmp_path / "i.tif")


def test_packed_12_bits(tmp_path):
    pairs = values(12).reshape(-1, 2)
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    write_tiff(tmp_path / "i.tif", packed, 12)
    check_ramp(tmp_path / "i.tif")
    inverted = b"".join(bytes([255 - byte]) for byte in packed)
    write_tiff(tmp_path / "i.tif", inverted, 12, t262=0)
    check_ramp(tmp_path / "i.tif")


@pytest.mark.parametrize("kind, dtype, scale", [(3, "f4", 1), (1, "u4", 65535), (2, "i2", 32767), (2, "i4", 65535)])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_float_and_signed_and_32_bit_values(tmp_path, kind, dtype, scale, white_is_zero):
    ramp = (1 - RAMP if white_is_zero else RAMP) * scale
    data, bits = ramp.astype(f"<{dtype}").tobytes(), 8 * int(dtype[1])
    write_tiff(tmp_path / "i.tif", data, bits, t262=int(not white_is_zero), t339=kind)
    check_ramp(tmp_path / "i.tif")


@pytest.mark.parametrize("kind, bits", [(1, 32), (2, 31)])
def test_32_bit_values_above_65535_are_not_clipped(tmp_path, kind, bits):
    """White is the largest value of as many bits as stated, of 32 otherwise."""
    write_tiff(tmp_path / "i.tif", values(bits), 32, t339=kind)
    check_ramp(tmp_path / "i.tif")
    for stated in (20, bits):
        write_tiff(tmp_path / "i.tif", values(stated), 32, t339=kind, t341=2**stated - 1)
        check_ramp(tmp_path / "i.tif")
    write_tiff(tmp_path / "i.tif", values(20), 32, t339=kind)
    assert decode(tmp_path / "i.tif", 32)[1][1] & TOO_DARK


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_black_and_changes_no_other(tmp_path, value):
    ramp = RAMP.astype("<f4")
    ramp[0] = value
    write_tiff(tmp_path / "i.tif", ramp.tobytes(), 32, t339=3)
    pixels = np.asarray(load_image(tmp_path / "i.tif"))[..., 0]
    assert (pixels[0] == 0).all() and np.abs(pixels[1:] - RAMP[1:] * 255).max() <= 1


def test_a_maximum_below_the_values_or_of_zero_is_not_believed(tmp_path):
    for stated in (0, 255):
        write_tiff(tmp_path / "i.tif", values(16), 16, t281=stated)
        check_ramp(tmp_path / "i.tif")


def test_a_maximum_that_is_the_largest_value_in_use_means_its_number_of_bits(tmp_path):
    write_tiff(tmp_path / "i.tif", values(12) * 3 // 4, 16, t281=3071)
    assert np.asarray(load_image(tmp_path / "i.tif")).max() == 191


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_a_png_has_its_significant_bits_whether_it_was_scaled_to_16_or_not(tmp_path, bits):
    write_png(tmp_path / "i.png", values(bits), [bits])
    check_ramp(tmp_path / "i.png")
    write_png(tmp_path / "i.png", values(bits) << (16 - bits) | values(bits) >> (2 * bits - 16), [bits])
    check_ramp(tmp_path / "i.png")


def test_a_dark_png_that_was_scaled_stays_dark(tmp_path):
    dark = values(12) // 20
    write_png(tmp_path / "i.png", dark << 4 | dark >> 8, [12])
    assert np.asarray(load_image(tmp_path / "i.png")).max() == 12


def test_colors_of_12_bits(tmp_path):
    colors = np.stack([values(12), values(12) // 2, values(12)], axis=-1)
    write_png(tmp_path / "i.png", colors, [12, 12, 12])
    check_ramp(tmp_path / "i.png")
    check_ramp(tmp_path / "i.png", channel=2)
    assert np.asarray(load_image(tmp_path / "i.png"))[..., 1].max() == 127
    write_png(tmp_path / "i.png", np.concatenate([colors, np.full((64, 64, 1), 4095)], axis=-1), [12] * 4)
    check_ramp(tmp_path / "i.png")


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_what_is_dark_without_stated_depth_is_noted(tmp_path, bits):
    write_png(tmp_path / "gray.png", values(bits))
    write_png(tmp_path / "color.png", np.stack([values(bits)] * 3, axis=-1))
    write_tiff(tmp_path / "gray.tif", values(bits), 16)
    write_tiff(tmp_path / "inverted.tif", values(bits), 16, t262=0)
    for name in ("gray.png", "color.png", "gray.tif", "inverted.tif"):
        assert decode(tmp_path / name, 32)[1][1] & TOO_DARK, name
    write_png(tmp_path / "full.png", values(16))
    Image.fromarray((values(16) // 1024).astype(np.uint8)).save(tmp_path / "8_bit.png")  # dark, but certainly so
    for name in ("full.png", "8_bit.png"):
        assert not decode(tmp_path / name, 32)[1][1] & TOO_DARK, name
