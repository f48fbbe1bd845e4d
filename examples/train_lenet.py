"""Trains LeNet-5, as the lectures draw it, on Fashion-MNIST: with fastconv's layers, with torch's, or with both.

python examples/train_lenet.py                    # fastconv, two epochs
python examples/train_lenet.py --layers torch
python examples/train_lenet.py --compare          # both from the same weights, epochs in turn, three epochs

1×28×28 → conv 20@5×5 → ReLU → max pool 2 → conv 50@5×5 → ReLU → max pool 2 → 2450 → 500 → ReLU → 10
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # an installed fastconv comes first, the one built in place next

import fashion_mnist  # noqa: E402

import fastconv  # noqa: E402

BATCH = 64
LEARNING_RATE = 1e-3


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 20, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 7 * 7, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


class Training:
    """A model, its optimizer, and what its epochs gave."""

    def __init__(self, name, model, data):
        self.name, self.model, self.data = name, model, data
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.seconds, self.accuracies = [], []

    def epoch(self):
        """One pass over the training images, timed, and one over the test images. The order depends on the number of
        the epoch alone, so that every model sees the same batches."""
        images, labels, test_images, test_labels = self.data
        number = len(self.seconds) + 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(number)).to(images.device)
        self.model.train()
        loss_sum = torch.zeros((), device=images.device)
        start = time.perf_counter()
        for i in range(0, len(order), BATCH):
            batch = order[i : i + BATCH]
            loss = F.cross_entropy(self.model(images[batch]), labels[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach() * len(batch)
            if sys.stderr.isatty() and i // BATCH % 20 == 0:
                print(f"\r{self.name:8}  epoch {number}  {i}/{len(order)}", end="", file=sys.stderr, flush=True)
        mean_loss = loss_sum.item() / len(order)  # waits for a GPU
        self.seconds.append(time.perf_counter() - start)
        self.accuracies.append(self.accuracy(test_images, test_labels))
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(
            f"{self.name:8}  epoch {number}  loss {mean_loss:.4f}  test accuracy {self.accuracies[-1]:6.2%}  "
            f"{self.seconds[-1]:.1f} s",
            flush=True,
        )

    @torch.no_grad()
    def accuracy(self, images, labels):
        self.model.eval()
        guesses = torch.cat([self.model(batch).argmax(1) for batch in images.split(500)])
        return (guesses == labels).double().mean().item()


def draw_filters(training, path):
    """The first layer's 20 filters of 5×5 as a PNG, from its own darkest to its own brightest."""
    try:
        import matplotlib
    except ImportError:
        print("no picture of the filters: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    filters = training.model[0].weight.detach().cpu()[:, 0]
    figure, axes = plt.subplots(4, 5, figsize=(5, 4.4), layout="constrained")
    for axis, weights in zip(axes.flat, filters, strict=True):
        axis.imshow(weights, cmap="gray")
        axis.set_axis_off()
    epochs = len(training.seconds)
    figure.suptitle(f"LeNet-5's first layer after {epochs} epoch{'s' * (epochs != 1)} ({training.name})", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"written: {path}")


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", choices=("fastconv", "torch"), default="fastconv", help="default: fastconv")
    parser.add_argument("--compare", action="store_true", help="train both, epochs in turn, and compare them")
    parser.add_argument("--epochs", type=int, help="default: 2, or 3 with --compare")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", metavar="FOLDER", help=f"of the IDX files; default: {fashion_mnist.DEBIAN}")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=ROOT / "examples" / "out", help="for the picture")
    options = parser.parse_args(arguments)
    options.epochs = options.epochs or (3 if options.compare else 2)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    return options


def main(arguments=None):
    options = parse(arguments)
    try:
        data = [tensor.to(options.device) for tensor in fashion_mnist.load(options.data)]
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    torch.manual_seed(0)
    model = lenet().to(options.device)
    names = ("fastconv", "torch") if options.compare else (options.layers,)
    trainings = []
    for name in names:
        layers = copy.deepcopy(model)
        trainings.append(Training(name, fastconv.convert(layers) if name == "fastconv" else layers, data))
    print(f"LeNet-5, {len(data[0])} images, batches of {BATCH}, torch {torch.__version__}, {options.device}")
    for number in range(options.epochs):
        for training in trainings if number % 2 == 0 else reversed(trainings):
            training.epoch()
    if options.compare:
        compare(*trainings)
    draw_filters(trainings[0], options.out / f"lenet_filters_{trainings[0].name}.png")


def compare(ours, theirs):
    """Prints the medians of the epochs' times and the accuracies after the second epoch (or the only one)."""
    medians = [statistics.median(training.seconds) for training in (ours, theirs)]
    at = min(2, len(ours.accuracies))
    mine, other = ours.accuracies[at - 1], theirs.accuracies[at - 1]
    ratio = medians[0] / medians[1]
    print(f"median epoch: fastconv {medians[0]:.1f} s, torch {medians[1]:.1f} s: {ratio:.2f}× of torch's")
    print(f"accuracy after epoch {at}: fastconv {mine:.2%}, torch {other:.2%}, {100 * (mine - other):+.2f} points")


if __name__ == "__main__":
    main()
