"""Plant one fault of the corpus (tests/mutants/corpus) in a copy of the FMS checkout.

python tests/fms_checkout/faults.py NAME OUT [--checkout build/fms-checkout]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as a script, this file's own folder is in its place.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.mutants.corpus import MUTANTS, edit_of
from tests.mutants.mutant import Edit, plant


def main() -> None:
    """Read the arguments and plant."""
    names = [name for name, mutant in MUTANTS.items() if isinstance(mutant.fault, Edit)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkout", type=Path, default=Path("build/fms-checkout"))
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists already")
    plant(edit_of(arguments.name), checkout=arguments.checkout, out=arguments.out)


if __name__ == "__main__":
    main()
