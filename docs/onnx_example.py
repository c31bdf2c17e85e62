"""Predict photographs with an exported model, without PyTorch: python onnx_example.py model.onnx PHOTO..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3:
    sys.exit("usage: python onnx_example.py model.onnx PHOTO...")
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
metadata = session.get_modelmeta().custom_metadata_map
classes, size = json.loads(metadata["classes"]), int(metadata["image_size"])

for path in sys.argv[2:]:
    with Image.open(path) as photo:
        photo.draft(None, (size, size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8, as in the training
        pixels = np.asarray(ImageOps.exif_transpose(photo).convert("RGB"))
    probabilities = session.run(["probabilities"], {"images": pixels[np.newaxis]})[0][0]
    named = ", ".join(f"{name} {p:.6f}" for name, p in zip(classes, probabilities, strict=True))
    print(f"{path}: {classes[probabilities.argmax()]} ({named})")
