"""How much memory a training step of ResNet-18 takes at its peak, and what forward keeps for backward.

    python benchmarks/step_memory.py [--layout nhwc] [--dtype bfloat16]

The step is forward, cross-entropy, backward and SGD with momentum, by torch's layers, by fastconv's, and by these
fused. The peak is counted from what is there between two steps: parameters, momentum and images. It is measured as in
memory.py, in a process of its own on a CPU. What is kept is every storage that autograd saves, once, but for the
parameters and images.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import machine  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from memory import map_every_block, peak_bytes, peak_is_readable  # noqa: E402
from networks import NETWORKS  # noqa: E402
from report import console, plain_table  # noqa: E402

import fastconv  # noqa: E402

TITLE = "training step of ResNet-18: MiB at its peak, and kept between forward and backward"
HEADER = ("variant", "layout", "images", "peak", "kept", "of torch's peak")
VARIANTS = ("torch", "fastconv", "fused")
IMAGES = {"cpu": 8, "cuda": 64}
SIZE = (3, 224, 224)


def model_of(variant, layout, dtype, device):
    torch.manual_seed(0)
    memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    model = NETWORKS["ResNet-18"].build().to(device, machine.DTYPES[dtype], memory_format=memory)
    if variant == "torch":
        return model
    model = fastconv.convert(model)
    return fastconv.fuse(model) if variant == "fused" else model


def kept_bytes(model, x):
    """Of what autograd saves in a forward pass."""
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(kept.values())


def measure_here(variants, layout, dtype, device, images=None, size=SIZE):
    rows = []
    images = images or IMAGES[device]
    for variant in variants:
        model = model_of(variant, layout, dtype, device)
        memory = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        x = torch.randn(images, *size).to(device, machine.DTYPES[dtype], memory_format=memory)
        targets = torch.arange(images, device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(model=model, x=x, targets=targets, optimizer=optimizer):
            F.cross_entropy(model(x), targets).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        step()  # once more, now that the libraries have made what they keep
        peak, _ = peak_bytes(step, device)
        rows.append({
            "variant": variant, "layout": layout.upper(), "images": images, "peak_bytes": peak,
            "kept_bytes": kept_bytes(model, x),
        })  # fmt: skip
    return rows


def measure_step_memory(layout, dtype, device):
    """A row for each variant; none on a CPU whose system does not tell a process's peak."""
    if device == "cuda":
        return measure_here(VARIANTS, layout, dtype, device)
    if not peak_is_readable():
        return []
    rows = []
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--json", "--layout", layout, "--dtype", dtype, "--variant", variant,
                   "--threads", str(torch.get_num_threads())]  # fmt: skip
        rows += json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return rows


def lines(rows):
    peak = {row["variant"]: row["peak_bytes"] for row in rows}.get("torch")
    return [
        [row["variant"], row["layout"], str(row["images"]), f"{row['peak_bytes'] / 2**20:.0f}",
         f"{row['kept_bytes'] / 2**20:.0f}", f"{row['peak_bytes'] / peak:.2f}×" if peak else "–"]
        for row in rows
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Measures the memory of a training step.")
    parser.add_argument("--dtype", choices=machine.DTYPES, default="float32")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--variant", choices=VARIANTS, help="this one alone, in this process")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.variant:
        map_every_block()
        rows = measure_here((options.variant,), options.layout, options.dtype, "cpu")
    else:
        rows = measure_step_memory(options.layout, options.dtype, machine.choose_device("auto"))
    if options.json:
        print(json.dumps(rows))
    else:
        console().print(plain_table(TITLE, HEADER, lines(rows)))


if __name__ == "__main__":
    main()
