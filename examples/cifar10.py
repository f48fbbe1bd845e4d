"""CIFAR-10 as tensors, from its binary files: data_batch_1.bin … data_batch_5.bin and test_batch.bin."""

from pathlib import Path

import torch

TRAINING, TEST = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes in row-major order


def read(path):
    """(images N×3×32×32, labels N), both uint8, of one file. ValueError if it is something else."""
    data = Path(path).read_bytes()
    if not data or len(data) % RECORD:
        raise ValueError(f"{path} has {len(data)} bytes, which are no records of {RECORD}")
    records = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has labels beyond 9")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def load(folder):
    """(training images, labels, test images, labels): images N×3×32×32 in float32, normalized; labels int64.

    Raises FileNotFoundError, whose message says which files are needed.
    """
    folder = Path(folder)
    missing = [name for name in TRAINING + TEST if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: the binary version of CIFAR-10 has them")
    images, labels = (torch.cat(parts) for parts in zip(*(read(folder / name) for name in TRAINING), strict=True))
    test_images, test_labels = read(folder / TEST[0])
    mean, deviation = (f(images.float() / 255) for f in (_mean, _deviation))

    def normalized(values):
        return (values.float() / 255 - mean) / deviation

    return normalized(images), labels.long(), normalized(test_images), test_labels.long()


def _mean(images):
    return images.mean((0, 2, 3))[:, None, None]


def _deviation(images):
    return images.std((0, 2, 3))[:, None, None]
