"""The peak memory of a training step of a network: activations, gradients and workspaces, beyond the parameters.

On a CPU the peak is the process's own (see memory.py), in a process that does nothing else.
"""

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import models  # noqa: E402
import torch  # noqa: E402
from memory import map_every_block, peak_bytes, peak_is_readable  # noqa: E402


def measure_here(name, device, layout, images):
    """{variant: bytes}. torch.compile's is not among them: to compile takes memory, too."""
    case = models.Case(name, models.TRAINING, device, layout, images)
    found = {}
    for variant in case.models:
        for _ in range(2):  # once more, now that the library has made what it keeps
            case.optimizer.zero_grad()
            gc.collect()
            found[variant], _ = peak_bytes(case.call(variant), device)
    return found


def measure_memory(name, device, layout, images):
    """{variant: bytes}; {} on a CPU whose system does not tell a process's peak."""
    if device == "cuda":
        return measure_here(name, device, layout, images)
    if not peak_is_readable():
        return {}
    command = [sys.executable, __file__, name, layout, str(images), str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description="Prints the peak memory of a training step on a CPU as JSON.")
    parser.add_argument("name", choices=models.NETWORKS)
    parser.add_argument("layout", choices=("NCHW", "NHWC"))
    parser.add_argument("images", type=int)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    map_every_block()
    print(json.dumps(measure_here(options.name, "cpu", options.layout, options.images)))


if __name__ == "__main__":
    main()
