"""Draws what weight sharing buys: a convolution follows an image that is shifted, locally connected units do not.

python docs/figures/locally_connected.py

Locally connected units have weights of their own at each place. They are a grouped convolution: the patch that an
output reads becomes a group of its own, with one output each.
"""

import figures
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import fastconv

SIZE, SHIFT = 24, 6


def locally_connected(x, weight, padding):
    """y[n][k][p][q] = Σ x[n][c][p − pad + r][q − pad + s] · w[p][q][k][c][r][s], of weights P × Q × K × C × R × S."""
    P, Q, K, C, R, S = weight.shape
    patches = F.unfold(x, (R, S), padding=padding).transpose(1, 2).reshape(len(x), P * Q * C, R, S)
    y = fastconv.conv2d(patches, weight.reshape(P * Q * K, C, R, S), groups=P * Q)
    return y.view(len(x), P, Q, K).permute(0, 3, 1, 2)


def cross():
    """An image with a bright cross in its upper left."""
    image = torch.zeros(1, 1, SIZE, SIZE)
    image[..., 4:13, 8] = image[..., 8, 4:13] = 1.0
    return image


def responses():
    """{name: (response to the image, to the shifted image)} of both kinds of unit, on the same random weights."""
    torch.manual_seed(0)
    image = cross()
    shifted = image.roll((SHIFT, SHIFT), (2, 3))
    shared, own = torch.randn(1, 1, 5, 5), torch.randn(SIZE, SIZE, 1, 1, 5, 5)
    return {
        "image": (image, shifted),
        "convolution": tuple(fastconv.conv2d(x, shared, padding=2) for x in (image, shifted)),
        "locally connected": tuple(locally_connected(x, own, padding=2) for x in (image, shifted)),
    }


def main(arguments=None):
    options = figures.parser(__doc__).parse_args(arguments)
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.4), layout="constrained")
    found = responses()
    for column, (name, pair) in enumerate(found.items()):
        high = max(y.abs().max() for y in pair).item()
        colours = {"cmap": "gray", "vmin": 0} if name == "image" else {"cmap": "RdBu_r", "vmin": -high}
        for axis, y, which in zip(axes[:, column], pair, ("", "shifted "), strict=True):
            axis.imshow(y[0, 0].numpy(), vmax=high, **colours)
            axis.set_title(f"{which}image" if name == "image" else f"{name}\nof the {which}image", fontsize=9)
    for axis, name in zip(axes[:, 3], list(found)[1:], strict=True):
        before, after = found[name]
        difference = (after - before.roll((SHIFT, SHIFT), (2, 3)))[0, 0]
        axis.imshow(difference.numpy(), cmap="RdBu_r", vmin=-high, vmax=high)
        axis.set_title(f"{name}: lower −\nshifted upper, at most {difference.abs().max():.2g}", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figures.save(figure, options.out / "locally_connected.png")


if __name__ == "__main__":
    main()
