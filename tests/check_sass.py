"""Fails where a compiled CUDA kernel lacks the instructions that it is for: tensor-core products, asynchronous copies.

Needs cuobjdump and nvdisasm: those of a CUDA toolkit on PATH, or pip's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
kernel_table.py shows what all kernels consist of.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import check_ptxas

OBJECTS = check_ptxas.LOGS
FUNCTION = re.compile(r"Function : (\w+)")
ARCH = re.compile(r"arch = (sm_\w+)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
KINDS = {
    "mma": re.compile(r"HMMA|DMMA|HGMMA|UTCHMMA"),
    "ldmatrix": re.compile(r"LDSM"),
    "cp.async": re.compile(r"LDGSTS"),
    "global 128": re.compile(r"(LDG|STG)\b.*\.128"),
    "global 64": re.compile(r"(LDG|STG)\b.*\.64"),
    "global": re.compile(r"(LDG|STG)\b"),
    "shared": re.compile(r"(LDS|STS)\b"),
    "local": re.compile(r"(LDL|STL)\b"),
}


# Of kernels whose name contains the first; sm_75, which they are not launched on, is left out.
NEEDED = {"mma_kernel": ("mma", "cp.async"), "implicit_gemm_kernel": ("cp.async",)}


def tool(name):
    """The path of a program of the CUDA toolkit or of a pip package, or None."""
    for folder in map(Path, sys.path):
        if (path := folder / "nvidia" / "cu13" / "bin" / name).exists():
            return str(path)
    return shutil.which(name)


def kind(instruction):
    return next((name for name, pattern in KINDS.items() if pattern.match(instruction)), "other")


def count(sass):
    """{(kernel, architecture): Counter of instructions by kind} of cuobjdump's output."""
    kernels, arch, entry = {}, None, None
    for line in sass.splitlines():
        if match := ARCH.search(line):
            arch = match.group(1)
        elif match := FUNCTION.search(line):
            entry = kernels.setdefault((match.group(1), arch), Counter())
        elif entry is not None and (match := INSTRUCTION.search(line)):
            entry[kind(match.group(1))] += 1
    return kernels


def complaints(kernels):
    """What is missing in which kernel."""
    for (name, arch), kinds in kernels.items():
        for part, instructions in NEEDED.items():
            if part in name and arch != "sm_75":
                yield from (f"{arch}: {name} has no {kind} instruction" for kind in instructions if not kinds[kind])


def disassemble(pattern):
    """What count() finds in the objects whose names match."""
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    if not cuobjdump or not nvdisasm:
        sys.exit("cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = {**os.environ, "PATH": f"{Path(nvdisasm).parent}:{os.environ['PATH']}"}
    kernels = {}
    for log in sorted(OBJECTS.glob(f"{pattern}.o.log")):
        if "Compiling entry function" not in log.read_text():  # no kernels
            continue
        path = log.with_suffix("")
        run = subprocess.run([cuobjdump, "-sass", path], env=environment, capture_output=True, text=True, check=True)
        kernels |= count(run.stdout)
    return kernels


def main():
    kernels = disassemble("*mma*") | disassemble("*implicit_gemm")
    found = list(complaints(kernels))
    print(*found, sep="\n")
    print(f"{len(kernels)} kernels disassembled, {len(found)} complaints")
    sys.exit(bool(found) or not kernels)


if __name__ == "__main__":
    main()
