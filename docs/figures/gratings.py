"""Synthetic colour images where no real ones are at hand: striped patches in two opposing colours on noise.

The class is the stripes' direction and pair of colours. What a first layer learns from them is no discovery: edges in
these directions and colours are all that there is.
"""

import math

import torch

DIRECTIONS = 4
PAIRS = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])  # white–black, red–green, yellow–blue
CLASSES, SIZE = DIRECTIONS * len(PAIRS), 32


def load(images, seed=0):
    """(images N×3×32×32 in float32 of mean 0, labels int64)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(images, 1, 1, generator=generator) * (high - low) + low

    labels = torch.randint(CLASSES, (images,), generator=generator)
    angle = math.pi * (labels % DIRECTIONS / DIRECTIONS)[:, None, None] + uniform(-0.2, 0.2)
    y, x = torch.meshgrid(*[torch.arange(SIZE) - SIZE / 2] * 2, indexing="ij")
    stripes = torch.cos(uniform(0.5, 1.2) * (x * angle.cos() + y * angle.sin()) + uniform(0, 2 * math.pi))
    patch = torch.exp(-((x - uniform(-6, 6)) ** 2 + (y - uniform(-6, 6)) ** 2) / (2 * uniform(4, 8) ** 2))
    colour = PAIRS[labels // DIRECTIONS][:, :, None, None]
    noise = torch.randn(images, 3, SIZE, SIZE, generator=generator)
    return 1.5 * (stripes * patch)[:, None] * colour + 0.3 * noise, labels
