"""`python -m lightning_hpu_infer`."""

import sys

from lightning_hpu_infer.cli import main

if __name__ == "__main__":
    sys.exit(main())
