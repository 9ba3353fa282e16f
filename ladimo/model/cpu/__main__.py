"""`python -m ladimo.model.cpu`: compile the step for every kind of processor of this architecture, for a container image."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from ladimo.model.cpu.build import SHIPPED, BuildError, compile_variants


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print the files. Returns the exit code: 0 compiled, 1 failed, with one line on stderr."""
    parser = ArgumentParser(prog="python -m ladimo.model.cpu", description="Compile the CPU step to ship with the package.")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="directory; the package's own if not given")
    try:
        paths = compile_variants(parser.parse_args(arguments).out)
    except BuildError as error:
        print(f"ladimo: {error}", file=sys.stderr)
        return 1
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
