"""Draws what one output of stacked 3×3 convolutions sees: the gradient of its value by every pixel.

python docs/figures/receptive_field.py

The weights are random and positive, so that no gradients cancel; colours are the gradient over its largest value.
"""

import figures
import matplotlib.pyplot as plt
import torch

import fastconv

SIZE, CHANNELS, LAYERS = 17, 8, (1, 2, 3, 5)


def seen(layers):
    """(the gradient of the central output by the image, H × W, over its maximum; the side of the square that it
    fills)."""
    torch.manual_seed(0)
    image = torch.zeros(1, 1, SIZE, SIZE, requires_grad=True)
    y = image
    for _ in range(layers):
        y = fastconv.conv2d(y, torch.rand(CHANNELS, y.shape[1], 3, 3), padding=1)
    y[0, 0, SIZE // 2, SIZE // 2].backward()
    gradient = image.grad[0, 0]
    return gradient / gradient.max(), int(gradient.any(0).sum())


def main(arguments=None):
    options = figures.parser(__doc__).parse_args(arguments)
    figure, axes = plt.subplots(1, len(LAYERS), figsize=(9, 2.6), layout="constrained")
    for axis, layers in zip(axes, LAYERS, strict=True):
        gradient, side = seen(layers)
        axis.imshow(gradient.where(gradient > 0, torch.nan).numpy(), cmap="viridis", vmin=0, vmax=1)
        corner = (SIZE - side) / 2 - 0.5
        axis.add_patch(plt.Rectangle((corner, corner), side, side, fill=False, edgecolor=figures.ORANGE, linewidth=2))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"{layers} × (3×3): {side}×{side}")
    figures.save(figure, options.out / "receptive_field.png")


if __name__ == "__main__":
    main()
