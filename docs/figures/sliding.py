"""Draws how often a sliding 3×3 filter reads each pixel of a 7×7 image, by stride, padding
and dilation.

python docs/figures/sliding.py

With every weight and every dy equal to 1, the gradient of a pixel is the number of windows that it lies in.
"""

import figures
import matplotlib.pyplot as plt
import torch

import fastconv

SIZE, KERNEL = 7, 3
CASES = ((1, 0, 1), (2, 0, 1), (3, 0, 1), (1, 1, 1), (1, 0, 2))  # stride, padding, dilation


def reads(stride, padding, dilation):
    """(how often each pixel is read, H × W; the output's size)."""
    image = torch.zeros(1, 1, SIZE, SIZE, requires_grad=True)
    y = fastconv.conv2d(image, torch.ones(1, 1, KERNEL, KERNEL), stride=stride, padding=padding, dilation=dilation)
    y.sum().backward()
    return image.grad[0, 0].int(), y.shape[-1]


def window(axis, at, side, colour):
    """The outline of the window whose corner is the pixel `at`, on both axes."""
    corner = (at - 0.5, at - 0.5)
    axis.add_patch(plt.Rectangle(corner, side, side, fill=False, linewidth=2.5, edgecolor=colour, zorder=5))


def main(arguments=None):
    options = figures.parser(__doc__).parse_args(arguments)
    figure, axes = plt.subplots(1, len(CASES), figsize=(9.5, 2.5), layout="constrained")
    for axis, (stride, padding, dilation) in zip(axes, CASES, strict=True):
        counts, outputs = reads(stride, padding, dilation)
        side = (KERNEL - 1) * dilation + 1
        figures.cells(axis, counts, cmap="Blues", vmin=0, vmax=14)
        for y, x in (counts == 0).nonzero().tolist():
            axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#f3d9d9", edgecolor="white"))
        window(axis, -padding, side, figures.BLUE)
        window(axis, (outputs - 1) * stride - padding, side, figures.ORANGE)
        axis.set_xlim(-0.5 - max(1, padding), SIZE + max(1, padding) - 0.5)
        axis.set_ylim(SIZE + max(1, padding) - 0.5, -0.5 - max(1, padding))
        for side in axis.spines.values():
            side.set_visible(False)
        more = f", padding {padding}" * bool(padding) + f", dilation {dilation}" * (dilation > 1)
        axis.set_title(f"stride {stride}{more}\n{SIZE} → {outputs}", fontsize=9)
    axes[0].text(-0.5, SIZE + 0.3, "first", color=figures.BLUE)
    axes[0].text(SIZE - 0.5, SIZE + 0.3, "last window", color=figures.ORANGE, ha="right")
    figures.save(figure, options.out / "sliding.png")


if __name__ == "__main__":
    main()
