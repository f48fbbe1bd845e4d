"""What `make mutate` breaks: each mutant takes its one other way, and the run without any notes which would have."""

import os
import subprocess
from pathlib import Path

import pytest
from mutation import rewrite

FOLDER = Path(rewrite.__file__).parent
KERNEL = """// A kernel.
#define __global__
#define __syncthreads() (++barriers)
#define max(a, b) ((a) > (b) ? (a) : (b))
namespace ptx {
template <int n>
void cp_async_wait() {}
}
int barriers = 0, loops = 0;
bool is_odd(int i) { return i % 2; }
__global__ int kernel(int i, int n) {
  if (i >= n) return -1;
  __syncthreads();
  ptx::cp_async_wait<2 - 1>();
  for (int k = 0; k < n; k += 2) ++loops;  // redundant: a reason
  // redundant: another
  const int even = is_odd(i) ? i - 1 : i;
  return max(even, int{4});
}
"""
MUTANTS = [
    (12, "> in `i >= n`", ""),
    (12, "without `i >= n`", ""),
    (13, "no __syncthreads", ""),
    (14, "no cp_async_wait<2 - 1>", ""),
    (15, "<= in `k < n`", "a reason"),
    (17, "without `is_odd(i)`", "another"),
    (18, "`int{4}` for `max(even, int{4})`", ""),
    (18, "`even` for `max(even, int{4})`", ""),
]
# result, barriers, loops; and the mutants that would have decided something else
RUNS = {
    (6, 8): {0: "6 1 4: 3 4 5 6 7", 3: "6 0 4", 5: "6 1 5", 6: "5 1 4", 7: "4 1 4", 8: "6 1 4"},
    (8, 8): {0: "-1 0 0: 1 2", 1: "8 1 4", 2: "8 1 4"},
    (3, 8): {0: "4 1 4: 3 4 5 8", 7: "4 1 4", 8: "2 1 4"},
}
MAIN = """
#include <cstdio>
#include <cstdlib>
int main(int, char** arguments) {
  fastconv_mutant = atoi(arguments[1]);
  const int result = kernel(atoi(arguments[2]), atoi(arguments[3]));
  printf("%d %d %d:", result, barriers, loops);
  for (int i = 0; i < fastconv_mutants; ++i)
    if (fastconv_differed[i]) printf(" %d", i);
}
"""


@pytest.fixture(scope="module")
def mutated(tmp_path_factory):
    """The mutants of the kernel, and a program that runs it."""
    folder = tmp_path_factory.mktemp("mutation")
    kernel, source, program = folder / "kernel.cu", folder / "kernel.cpp", folder / "kernel"
    kernel.write_text(KERNEL)
    text, mutants = rewrite.rewrite(kernel, 1)
    source.write_text(text + MAIN)
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Werror", f"-I{FOLDER}"]
    subprocess.run([*compiler, source, FOLDER / "mutants.cpp", "-o", program], check=True)
    return mutants, program


def test_what_is_mutated(mutated):
    mutants, _ = mutated
    assert [(m.line, m.what, m.redundant) for m in mutants] == MUTANTS
    assert [m.number for m in mutants] == list(range(1, len(MUTANTS) + 1))


@pytest.mark.parametrize("arguments", RUNS)
def test_each_mutant_takes_its_other_way(mutated, arguments):
    _, program = mutated
    for number, expected in RUNS[arguments].items():
        command = [program, str(number), *map(str, arguments)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert printed == expected if number == 0 else printed.startswith(expected + ":"), number
