"""Fashion-MNIST as tensors, from its IDX files, plain or gzipped."""

import gzip
import struct
from pathlib import Path

import torch

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts them
MEAN, DEVIATION = 0.2860, 0.3530  # of the training images' pixels


def read_idx(path):
    """The uint8 tensor in an IDX file: two zero bytes, 8 (unsigned bytes), the number of dimensions, their sizes as
    big-endian 32-bit integers, the values in row-major order. ValueError if it is something else."""
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    dimensions = data[3]
    if len(data) < 4 + 4 * dimensions:
        raise ValueError(f"{path} ends within its header")
    size = struct.unpack_from(f">{dimensions}I", data, 4)
    values = torch.frombuffer(bytearray(data[4 + 4 * dimensions :]), dtype=torch.uint8)
    if values.numel() != torch.Size(size).numel():
        raise ValueError(f"{path} has {values.numel()} values where its header says {' × '.join(map(str, size))}")
    return values.view(size)


def load(folder=None):
    """(training images, labels, test images, labels): images N×1×28×28 in float32, normalized; labels int64.

    Raises FileNotFoundError, whose message says how to get the files.
    """
    folder = Path(folder or DEBIAN)

    def read(name):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return read_idx(path)
        raise FileNotFoundError(
            f"{folder} has no {name}(.gz). On Debian: apt-get install dataset-fashion-mnist. Elsewhere, the four files "
            "of https://github.com/zalandoresearch/fashion-mnist in a folder, and --data FOLDER"
        )

    def images(name):
        return ((read(name).float() / 255 - MEAN) / DEVIATION).unsqueeze(1)

    return (
        images("train-images-idx3-ubyte"),
        read("train-labels-idx1-ubyte").long(),
        images("t10k-images-idx3-ubyte"),
        read("t10k-labels-idx1-ubyte").long(),
    )
