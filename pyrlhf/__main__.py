"""``python -m pyrlhf`` and ``deepspeed --module pyrlhf`` are the command ``pyrlhf``."""

import sys

from pyrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
