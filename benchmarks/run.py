"""Measures fastconv against torch (cuDNN or oneDNN).

    python benchmarks/run.py [layers] [--quick]       # the layers of benchmarks/layers.py; the default
    python benchmarks/run.py models [--quick]         # whole networks, those of benchmarks/networks
    python benchmarks/run.py compare A.json B.json    # what became slower from one result to the other

`python benchmarks/run.py models --help` shows a command's options. Every result is checked before it is timed.
docs/performance.md says how things are measured.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # an installed fastconv comes first, the one built in place next

COMMANDS = {"layers": "run_layers", "models": "run_models", "compare": "compare"}  # and the module whose main() it is


def main(arguments=None):
    """Runs a command, `layers` if none is named. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
    named = arguments and arguments[0] in COMMANDS
    command, rest = (arguments[0], arguments[1:]) if named else ("layers", arguments)
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        sys.exit(f"the benchmark needs {error.name}: pip install rich matplotlib")
    return importlib.import_module(COMMANDS[command]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
