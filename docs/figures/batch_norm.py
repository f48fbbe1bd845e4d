"""Draws what BatchNorm does to activations through a deep stack of 3×3 convolutions, for three scales of the weights.

python docs/figures/batch_norm.py

Each layer is a convolution, BatchNorm or none, and tanh. Without BatchNorm the activations die out or saturate unless
the weights' scale is just right; with it they are alike at every depth and scale.
"""

import figures
import matplotlib.pyplot as plt
import torch

import fastconv

CHANNELS, SIZE, BATCH = 32, 16, 16
SCALES = (0.5, 1.0, 4.0)  # of the weights' standard deviation, over 1 / √(9 · CHANNELS)
COLOURS = dict(zip(SCALES, (figures.BLUE, figures.GREY, figures.ORANGE), strict=True))


def activations(scale, normalized, depth):
    """The activations after each of `depth` layers, from one batch of normally distributed random numbers."""
    torch.manual_seed(0)
    x, found = torch.randn(BATCH, CHANNELS, SIZE, SIZE), []
    with torch.no_grad():
        for _ in range(depth):
            x = fastconv.conv2d(x, torch.randn(CHANNELS, CHANNELS, 3, 3) * scale / (9 * CHANNELS) ** 0.5, padding=1)
            if normalized:
                x = fastconv.batch_norm(x, None, None, training=True)
            x = x.tanh()
            found.append(x)
    return found


def main(arguments=None):
    parser = figures.parser(__doc__)
    parser.add_argument("--depth", type=int, default=20, help="layers; default: 20")
    options = parser.parse_args(arguments)
    figure = plt.figure(figsize=(9, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 5, width_ratios=(2.3, 1, 1, 1, 0.01))
    for line, normalized in enumerate((False, True)):
        curves = figure.add_subplot(grid[line, 0])
        for column, scale in enumerate(SCALES):
            found = activations(scale, normalized, options.depth)
            deviations = [x.std().item() for x in found]
            curves.plot(range(1, options.depth + 1), deviations, color=COLOURS[scale], label=f"weights × {scale:g}")
            histogram = figure.add_subplot(grid[line, column + 1])
            histogram.hist(found[-1].flatten().numpy(), bins=41, range=(-1.02, 1.02), color=COLOURS[scale])
            histogram.set_yticks([])
            histogram.set_title(f"layer {options.depth}, × {scale:g}", fontsize=9)
        curves.set_yscale("log")
        curves.set_ylim(1e-7, 3)
        curves.set_title(("without", "with")[normalized] + " BatchNorm: standard deviation of tanh(·)", fontsize=9)
        curves.set_xticks([1, *range(5, options.depth + 1, 5)])
        curves.set_xlabel("layer" if normalized else "")
        curves.legend(frameon=False, fontsize=8, loc="lower left")
    figures.save(figure, options.out / "batch_norm.png")


if __name__ == "__main__":
    main()
