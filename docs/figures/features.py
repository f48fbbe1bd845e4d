"""Trains a small convolutional network, and draws its first layer's filters and the feature maps of one image.

python docs/figures/features.py                     # Fashion-MNIST, if Debian's package is installed, or synthetic
python docs/figures/features.py --data FOLDER       # of the IDX files of Fashion-MNIST, or CIFAR-10's binary files
python docs/figures/features.py --data synthetic    # coloured stripes that the script makes

Writes features-<data>.png. C×H×H → conv 24@7×7 → ReLU → max pool 2 → conv 32@5×5 → ReLU → max pool 2 → classes.
"""

import sys
from pathlib import Path

import figures  # first, for the paths of the others
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import cifar10  # isort: skip
import fashion_mnist  # isort: skip
import gratings

import fastconv

SYNTHETIC = "synthetic"
TITLES = {
    "fashion-mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    SYNTHETIC: "synthetic striped images, not photographs",
}
BATCH, LEARNING_RATE = 64, 0.05


def load(data, images):
    """(name of the data, training images, labels, test images, labels), with at most `images` to train on."""
    if data is None:
        data = fashion_mnist.DEBIAN if fashion_mnist.DEBIAN.exists() else SYNTHETIC
    if data == SYNTHETIC:
        return SYNTHETIC, *gratings.load(images), *gratings.load(1000, seed=1)
    colour = (Path(data) / cifar10.TRAINING[0]).exists()
    x, labels, *test = (cifar10 if colour else fashion_mnist).load(data)
    return "cifar10" if colour else "fashion-mnist", x[:images], labels[:images], *test


def network(channels, size, classes):
    return fastconv.convert(
        nn.Sequential(
            nn.Conv2d(channels, 24, 7, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(24, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (size // 4) ** 2, classes),
        )
    )


def train(model, images, labels, epochs):
    with torch.no_grad():
        model[0].weight *= 0.1  # of the start little is left to see in the filters
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-3)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model, images, labels):
    guesses = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    return (guesses == labels).double().mean().item()


def mosaic(tiles, columns):
    """N×H×W×1 or N×H×W×3 as one picture, each tile from its own darkest to its own brightest, white between them."""
    low, high = (extreme(tiles, (1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    tiles = ((tiles - low) / (high - low).clamp(min=1e-12)).expand(-1, -1, -1, 3)
    tiles = F.pad(tiles, (0, 0, 0, 1, 0, 1), value=1.0)
    n, h, w, _ = tiles.shape
    return tiles.view(n // columns, columns, h, w, 3).transpose(1, 2).reshape(n // columns * h, columns * w, 3)


def by(sizes):
    return "×".join(map(str, sizes))


@torch.no_grad()
def draw(model, image, title, path):
    filters = model[0].weight.permute(0, 2, 3, 1)
    first = model[:2](image[None])[0]
    second = model[:5](image[None])[0]
    figure, axes = plt.subplots(1, 4, figsize=(9, 3.6), layout="constrained", width_ratios=(0.7, 1, 1, 0.8))
    parts = (
        (mosaic(image.permute(1, 2, 0)[None], 1), f"image {by(image.shape)}"),
        (mosaic(filters, 4), f"first layer: 24 filters {by(model[0].weight.shape[1:])}"),
        (mosaic(first[..., None], 4), f"its maps {by(first.shape)}"),
        (mosaic(second[..., None], 4), f"the second's {by(second.shape)}"),
    )
    for axis, (picture, name) in zip(axes, parts, strict=True):
        axis.imshow(picture.numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=9)
        figures.bare(axis)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figures.save(figure, path)


def main(arguments=None):
    parser = figures.parser(__doc__)
    parser.add_argument("--data", help=f"a folder, or {SYNTHETIC!r}")
    parser.add_argument("--images", type=int, default=20_000, help="to train on; default: 20 000")
    parser.add_argument("--epochs", type=int, default=2, help="default: 2")
    options = parser.parse_args(arguments)
    try:
        name, images, labels, *test = load(options.data, options.images)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    torch.manual_seed(0)
    model = network(images.shape[1], images.shape[2], int(labels.max()) + 1)
    train(model, images, labels, options.epochs)
    epochs = f"{options.epochs} epoch{'s' * (options.epochs != 1)}"
    title = f"{TITLES[name]}: {len(images):,} images, {epochs}, test accuracy {accuracy(model, *test):.1%}"
    draw(model, test[0][0], title, options.out / f"features-{name}.png")


if __name__ == "__main__":
    main()
