"""Print the pins of a constraints file, without those of packages that come from outside this venv.

A venv made with --system-site-packages sees the machine's own torch, built for its GPU, and with it
numpy, triton and more. Pinning those would replace them.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def canonical(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(path: str) -> None:
    """Print the lines of `path` that pin what this venv has to install itself."""
    venv = Path(sys.prefix).resolve()
    brought = {
        canonical(found.name)
        for found in distributions()
        if not Path(found.locate_file("")).resolve().is_relative_to(venv)
    }
    for line in Path(path).read_text().splitlines():
        if canonical(line.partition("==")[0]) not in brought:
            print(line)


if __name__ == "__main__":
    main(sys.argv[1])
