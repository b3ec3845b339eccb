"""``python -m fxmem.demo`` is ``fxmem demo``."""

import sys

from fxmem.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
