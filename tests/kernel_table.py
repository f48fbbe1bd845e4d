"""Prints a table of the compiled CUDA kernels: what each instantiation is made of, on every architecture.

    python tests/kernel_table.py [--filter TEXT] [--arch sm_90]

Registers and spills are ptxas' (check_ptxas.py), instructions those of the machine code (check_sass.py): tensor-core
products (HMMA; DMMA of float64), asynchronous copies to shared memory (LDGSTS), loads and stores of global memory by
width. Threads and shared memory of a block are the most that the emulated kernels were launched with; the occupancy is
the share of an SM's threads that blocks of such a size can fill. Needs a build by `build_ext --inplace --emulated` and,
for the instructions, the pip packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import argparse
import ctypes
from dataclasses import dataclass

import check_ptxas
import check_sass
import pytest
import test_instantiations
from conftest import emulated_library_path


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of an SM (CUDA C++ Programming Guide, technical specifications by compute capability)."""

    threads: int
    blocks: int
    shared_bytes: int  # of all blocks
    reserved_bytes: int  # of each block, by the system
    registers: int = 65536

    def blocks_of(self, threads, registers, shared_bytes):
        """How many blocks of a kernel fit. Registers are given out 256 at a time, to warps."""
        warps = -(-threads // 32)
        by_registers = self.registers // (-(-32 * registers // 256) * 256 * warps)
        by_shared = self.shared_bytes // (shared_bytes + self.reserved_bytes or 1)
        return min(self.threads // (32 * warps), self.blocks, by_registers, by_shared)

    def occupancy(self, threads, registers, shared_bytes):
        return self.blocks_of(threads, registers, shared_bytes) * -(-threads // 32) * 32 / self.threads


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 64 << 10, 0),
    "sm_80": Multiprocessor(2048, 32, 164 << 10, 1 << 10),
    "sm_86": Multiprocessor(1536, 16, 100 << 10, 1 << 10),
    "sm_89": Multiprocessor(1536, 24, 100 << 10, 1 << 10),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    "sm_100": Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    "sm_120": Multiprocessor(1536, 24, 100 << 10, 1 << 10),
}


class Launches:
    """A pytest plugin that notes (threads, bytes of shared memory) of a block of each instantiation."""

    def __init__(self):
        self.blocks = {}

    def pytest_sessionfinish(self):
        library = ctypes.CDLL(str(emulated_library_path()))
        for name in ("threads", "shared_bytes"):
            function = getattr(library, f"fastconv_emulation_{name}")
            function.restype, function.argtypes = ctypes.c_uint64, [ctypes.c_uint64]
        kernels = test_instantiations.declared_kernels()
        for name, offset in test_instantiations.emulated_instantiations(library._name, kernels).items():
            block = library.fastconv_emulation_threads(offset), library.fastconv_emulation_shared_bytes(offset)
            self.blocks[name] = block


def launches():
    """{instantiation: (threads, bytes of shared memory)}, by the test that runs all of them."""
    plugin = Launches()
    test = f"{test_instantiations.__file__}::test_every_instantiation_runs"
    if pytest.main(["-qq", "--no-header", "-p", "no:cacheprovider", test], [plugin]) != 0:
        raise SystemExit("the emulated kernels must run: python setup.py build_ext --inplace --emulated")
    return plugin.blocks


def rows(blocks, instructions):
    """(kernel, architecture, …) as the table shows them."""
    compiled = [kernel for log in sorted(check_ptxas.LOGS.glob("*.o.log")) for kernel in check_ptxas.read(log)[1]]
    symbols = [name for name, *_ in compiled]
    named = test_instantiations.instantiations(symbols, test_instantiations.declared_kernels())
    for index, name in sorted(named, key=lambda pair: (pair[1], int(compiled[pair[0]][1].strip("sma_")))):
        symbol, arch, registers, stack, spilled = compiled[index]
        threads, shared_bytes = blocks.get(name, (0, 0))
        limits = MULTIPROCESSORS.get(arch.rstrip("a"))
        occupancy = f"{limits.occupancy(threads, registers, shared_bytes):.0%}" if limits and threads else "–"
        kinds = instructions.get((symbol, arch), {})
        counts = [kinds.get(k, 0) for k in ("mma", "cp.async", "global 128", "global 64", "global", "shared", "local")]
        yield name, arch, registers, stack, spilled, threads, shared_bytes, occupancy, *counts


def main():
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", metavar="TEXT", default="", help="only the kernels whose name contains it")
    parser.add_argument("--arch", default="", help="only this architecture")
    options = parser.parse_args()
    table = Table(box=None, pad_edge=False)
    table.add_column("kernel", overflow="fold")
    table.add_column("arch")
    for header in (
        *("registers", "stack B", "spilled B", "threads", "shared B", "occupancy"),
        *("HMMA/ DMMA", "LDGSTS", "global 128", "global 64", "global ≤32", "shared", "local"),
    ):
        table.add_column("\n".join(header.split(" ")), justify="right")
    for row in rows(launches(), check_sass.disassemble("*")):
        if options.filter in row[0] and row[1].startswith(options.arch):
            table.add_row(*map(str, row))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)


if __name__ == "__main__":
    main()
