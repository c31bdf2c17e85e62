"""A small data set of the shape of AI-Hub 71645, in folders and in zip files."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 90, 120
DEVICES = {"1": "1. 디지털카메라", "2": "2. 스마트패드"}
AREAS = {
    0: ([0, 0, 90, 120], {"acne": None}, {"pigmentation_count": 146}),
    1: ([20, 10, 70, 30], {"forehead_wrinkle": 3, "forehead_pigmentation": 1}, {"forehead_moisture": 59.97}),
    5: ([5, 50, 35, 90], {"l_cheek_pore": 2}, {"l_cheek_pore": 608, "l_cheek_moisture": "Er"}),
    6: ([55, 50, 85, 90], {"r_cheek_pore": 4}, {"r_cheek_pore": 1200, "r_cheek_moisture": 43.5}),
    7: ([30, 95, 60, 110], {"lip_dryness": 0}, None),
}


def photograph(seed=0, size=(WIDTH, HEIGHT), **options):
    """-> a JPEG whose pixels say where they are: red grows to the right, green downwards."""
    width, height = size
    pixels = np.full((height, width, 3), 20 * seed % 255, np.uint8)
    pixels[..., 0] = np.arange(width) * 2
    pixels[..., 1] = np.arange(height)[:, None] * 2
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=98, subsampling=0, **options)
    return file.getvalue()


def label(person, device, angle, area, **changes):
    """-> the content of a JSON file. changes: bbox, annotations, equipment, filename, width, height"""
    box, grades, values = AREAS[area]
    images = {"device": int(device) - 1, "facepart": area, "bbox": changes.pop("bbox", box)}
    images |= {key: changes.pop(key) for key in ("width", "height") if key in changes}
    info = {"filename": changes.pop("filename", f"{person}_{device}_{angle}.jpg"), "id": person}
    document = {
        "info": {**info, "gender": "F", "age": 55},
        "images": images,
        "annotations": changes.pop("annotations", grades),
        "equipment": changes.pop("equipment", values),
    }
    assert not changes
    return json.dumps(document, ensure_ascii=False).encode()


def files(people=("0001", "0002"), angles=("F", "L"), devices=("1", "2")):
    """-> {path: content} of a data set without problems, in `img` and `label`"""
    content = {}
    for number, person in enumerate(people):
        for device in devices:
            for angle in angles:
                name, place = f"{person}_{device}_{angle}", f"{DEVICES[device]}/{person}"
                content[f"img/{place}/{name}.jpg"] = photograph(number)
                for area in AREAS:
                    content[f"label/{place}/{name}_{area:02d}.json"] = label(person, device, angle, area)
    return content


def write_tree(folder, content):
    """-> folder"""
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zips(folder, content, method=zipfile.ZIP_DEFLATED):
    """-> the zip files of images and labels, TS.zip and TL.zip"""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, top in (("TS.zip", "img/"), ("TL.zip", "label/")):
        paths.append(folder / name)
        with zipfile.ZipFile(paths[-1], "w", method) as archive:
            for path, data in content.items():
                if path.startswith(top):
                    archive.writestr(path.removeprefix(top), data)
    return paths
