"""Breaks the CUDA kernels in many small ways, and shows which the emulated tests do not notice.

    python tests/mutate.py [FILE[:LINE] …]      of csrc/cuda; default: all

Builds a copy of the tree in build/mutate/tree whose emulated library holds every mutant (see mutation/rewrite.py) and
runs the emulated tests for each. Prints, and writes to build/mutate/table.txt, what was mutated where and which test
failed. Fails if a mutant survives in a line without a comment "// redundant: reason", at its end or before it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutate"
TREE = WORK / "tree"
sys.path.insert(0, str(ROOT / "tests" / "mutation"))
import rewrite  # noqa: E402

OPS = ("avg_pool2d", "batch_norm", "conv2d_mma", "conv2d", "max_pool2d")
SWITCH = """// Which mutant runs; 0: none.
extern "C" __attribute__((visibility("default"))) int fastconv_mutant;
int fastconv_mutant = 0;
"""


def write(path, text):
    """Leaves a file alone, and its time, if it has this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def copy_tree():
    """What git knows or would, and what was built of it, so that only what is mutated is compiled again."""
    if not TREE.exists():
        shutil.copytree(ROOT / "build" / "ninja", TREE / "build" / "ninja")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    names = [name for name in listed.stdout.decode().splitlines() if (ROOT / name).exists()]
    for path in (p for folder in ("csrc", "fastconv", "tests") for p in (TREE / folder).rglob("*.*")):
        if path.suffix != ".so" and str(path.relative_to(TREE)) not in names:
            path.unlink()
    for name in names:
        target = TREE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("csrc/cuda/"):
            continue  # mutate() writes these
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            shutil.copy2(ROOT / name, target)


def ops_of(file):
    """The ops whose kernels include a file of csrc/cuda, directly or not."""
    for op in OPS:
        if file.startswith(op):
            return {op}
    users = [p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu*") if f'#include "{file}"' in p.read_text()]
    return set().union(*map(ops_of, users)) or set(OPS)


def mutate():
    """Writes the mutated kernels to the copy. Returns the mutants."""
    mutants = []
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        text = path.read_text()
        if path.suffix in (".cu", ".cuh"):
            text, found = rewrite.rewrite(path, len(mutants) + 1)
            mutants += found
        write(TREE / "csrc" / "cuda" / path.name, text)
    write(TREE / "tests" / "emulation" / "mutant.cpp", SWITCH)
    return mutants


def build(sanitizers):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--emulated", *sanitizers]
    subprocess.run(command, cwd=TREE, env={**os.environ, "FASTCONV_CUDA": "0"}, check=True)


def run_tests(mutants, orders, time_limit, sanitizer=None):
    """{number: what killed the mutant, or None}"""
    todo, results = WORK / "mutants.json", WORK / "results.json"
    todo.write_text(json.dumps([[m.number, sorted(ops_of(m.file))] for m in mutants]))
    results.write_text("{}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:faulthandler", "tests", "-k", "emulated"]
    options = ["--mutants", todo, "--results", results, "--orders", orders, "--time-limit", str(time_limit)]
    if sanitizer:
        options += ["--fastconv-sanitizer", sanitizer]
    path = os.pathsep.join([str(TREE), str(TREE / "tests" / "mutation"), str(TREE / "tests")])
    subprocess.run([*command, *options], cwd=TREE, env={**os.environ, "PYTHONPATH": path}, check=True)
    return {int(number): killer for number, killer in json.loads(results.read_text()).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", metavar="FILE[:LINE]")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--orders", default="forward,reverse,shuffled", help="of the threads (%(default)s)")
    parser.add_argument("--sanitizers", default="address,thread", help="tried on survivors (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=20, help="of a test, in seconds")
    arguments = parser.parse_args()
    copy_tree()
    places = arguments.places
    mutants = [m for m in mutate() if not places or m.file in places or f"{m.file}:{m.line}" in places]
    if arguments.list:
        print(*(f"{m.file}:{m.line}: {m.what}" for m in mutants), sep="\n")
        return
    sanitizers = [s for s in arguments.sanitizers.split(",") if s]
    build(["--sanitizers", arguments.sanitizers] if sanitizers else [])
    killers = run_tests(mutants, arguments.orders, arguments.time_limit)
    for sanitizer in sanitizers:
        if not (survivors := [m for m in mutants if not killers[m.number] and not m.redundant]):
            break
        killers |= run_tests(survivors, "forward", 10 * arguments.time_limit, sanitizer)
    lines, counts = [], {"killed": 0, "redundant": 0, "SURVIVED": 0}
    for m in mutants:
        killer = killers[m.number]
        fate = "killed" if killer else "redundant" if m.redundant else "SURVIVED"
        counts[fate] += 1
        lines.append(f"{m.file}:{m.line:<4} {fate:9} {m.what:70} {killer or m.redundant}")
    lines.append(f"{len(mutants)} mutants: " + ", ".join(f"{count} {fate}" for fate, count in counts.items()))
    write(WORK / "table.txt", "\n".join(lines) + "\n")
    print(*lines, sep="\n")
    sys.exit(counts["SURVIVED"] > 0)


if __name__ == "__main__":
    main()
