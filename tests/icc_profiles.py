"""Small ICC profiles for the tests: Display P3, Adobe RGB and sRGB by their primaries, a gray and a CMYK one."""

import struct

# colorants, adapted to D50 as in a profile: X, Y and Z of red, green and blue
PRIMARIES = {
    "p3": ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)),
    "adobe": ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)),
    "srgb": ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)),
}
D50 = (0.9642, 1.0, 0.8249)


def _fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values):
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _curve(to_linear):
    """The tone curve of sRGB, or a gamma."""
    if to_linear != "srgb":
        return b"curv\0\0\0\0" + struct.pack(">LH", 1, round(to_linear * 256))
    levels = [i / 1023 for i in range(1024)]
    table = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return b"curv\0\0\0\0" + struct.pack(">L1024H", 1024, *(round(65535 * value) for value in table))


def _profile(space, device_class, connection_space, tags):
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">L", 5) + b"test\0" + bytes(78), b"wtpt": _xyz(D50), **tags}
    start, table, data = 128 + 4 + 12 * len(tags), struct.pack(">L", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">LL", start + len(data), len(content))
        data += content
    header = struct.pack(">L4sL4s4s4s", start + len(data), bytes(4), 0x02400000, device_class, space, connection_space)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(*D50)
    return header.ljust(128, b"\0") + table + data


def rgb_profile(name):
    """name: p3, adobe or srgb."""
    curve = _curve(2.2 if name == "adobe" else "srgb")
    colorants = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(_xyz, PRIMARIES[name]), strict=True))
    return _profile(b"RGB ", b"mntr", b"XYZ ", {**colorants, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def gray_profile(to_linear):
    """to_linear: "srgb" or a gamma."""
    return _profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": _curve(to_linear)})


def cmyk_profile():
    """Inks that only darken: the lightness is that of the missing ink, and there is no color at all."""
    identity = bytes(range(256))
    lightness = lambda c, m, y, k: round(255 * (1 - k) * (1 - (c + m + y) / 3))  # noqa: E731
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    table = b"".join(bytes([lightness(*corner), 128, 128]) for corner in corners)
    matrix = _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + table + identity * 3
    return _profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut})
