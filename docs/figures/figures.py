"""What the figures of docs/lectures.md share: the scripts' arguments, and how a picture is written."""

import argparse
import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from PIL import Image  # noqa: E402

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path += [str(ROOT), str(ROOT / "examples")]  # an installed fastconv comes first, the one built in place next

BLUE, ORANGE, GREY = "#2f6fa8", "#e08a2e", "#6b6b6b"
plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"})


def parser(description):
    """An argument parser with --out; what the script writes there has the name of the script."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--out", metavar="FOLDER", type=Path, default=FOLDER, help="default: docs/figures")
    return made


def save(figure, path):
    """Writes a figure as a PNG of 256 colours, which takes a third of the bytes, and closes it."""
    data = io.BytesIO()
    figure.savefig(data, dpi=100)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(data).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"written: {path}")


def cells(axis, values, text=str, **options):
    """A matrix as coloured squares with their values in them; NaN is left white."""
    axis.imshow(values.numpy(), **options)
    rows, columns = values.shape
    axis.set_xticks([x - 0.5 for x in range(1, columns)], [])
    axis.set_yticks([y - 0.5 for y in range(1, rows)], [])
    axis.grid(color="white", linewidth=1)
    axis.tick_params(length=0)
    for y in range(rows):
        for x in range(columns):
            if values[y, x] == values[y, x]:
                axis.text(x, y, text(values[y, x].item()), ha="center", va="center")


def bare(axis):
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
