"""Draws max pooling: which maximum is kept, and where the gradient goes.

python docs/figures/max_pool.py

Above, the lectures' 4×4 example with windows of 2×2 and stride 2; below, the same image with windows of 3×3 and stride
1, where a maximum can belong to several windows.
"""

import figures
import matplotlib.pyplot as plt
import torch

import fastconv

IMAGE = ((1, 1, 2, 4), (5, 6, 7, 8), (3, 2, 1, 0), (1, 2, 3, 4))
CASES = ((2, 2), (3, 1))  # kernel, stride
DY = ((1.0, 2.0), (3.0, 4.0))


def pooled(kernel, stride):
    """(x, the argmax as an index into x's plane, y, dx) of the pooling; dy is DY."""
    x = torch.tensor(IMAGE, dtype=torch.float32)[None, None].requires_grad_()
    y, argmax = fastconv.max_pool2d(x, kernel, stride, return_indices=True)
    y.backward(torch.tensor(DY)[None, None])
    return x.detach()[0, 0], argmax[0, 0], y.detach()[0, 0], x.grad[0, 0]


def integer(value):
    return f"{value:.0f}"


def main(arguments=None):
    options = figures.parser(__doc__).parse_args(arguments)
    figure, axes = plt.subplots(len(CASES), 5, figsize=(9, 4), layout="constrained")
    for line, (kernel, stride) in zip(axes, CASES, strict=True):
        x, argmax, y, dx = pooled(kernel, stride)
        figures.cells(line[0], x, integer, cmap="Blues", vmin=0, vmax=16)
        for index in argmax.flatten().tolist():
            corner = (index % x.shape[1] - 0.5, index // x.shape[1] - 0.5)
            line[0].add_patch(
                plt.Rectangle(corner, 1, 1, fill=False, edgecolor=figures.ORANGE, linewidth=2.5, zorder=5)
            )
        line[0].set_title(f"x, {kernel}×{kernel}, stride {stride}")
        parts = ((argmax, "argmax kept"), (y, "y"), (torch.tensor(DY), "dy"), (dx, "dx"))
        for axis, (values, title) in zip(line[1:], parts, strict=True):
            colours = {"cmap": "Oranges", "vmax": 20} if title.startswith("d") else {"cmap": "Blues", "vmax": 16}
            figures.cells(axis, values, integer, vmin=0, **(colours if title != "argmax kept" else {"cmap": "Greys",
                          "vmax": 60}))  # fmt: skip
            axis.set_title(title)
        for axis in line:
            for side in axis.spines.values():
                side.set_visible(False)
    figures.save(figure, options.out / "max_pool.png")


if __name__ == "__main__":
    main()
