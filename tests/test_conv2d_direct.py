"""Direct convolution: what smaller convolutions do not reach."""

import pytest
import torch
from test_conv2d import Case, check


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [
        # The CUDA kernel's blocks: so many that each walks over several tiles of pixels …
        Case("several tiles of pixels", (4, 264, 23, 23), (264, 1, 1, 1), groups=264),
        # … or over fewer channels than others.
        Case("channels for more than a block", (1, 50, 9, 17), (5, 50, 3, 3), padding=(1, 1)),
    ],
    ids=str,
)
def test_blocks_of_wgrad(backend, case, layout):
    check(backend, case, torch.float32, layout, "direct")
