"""``python -m runner.cache``: what the shared cache holds; prunes it."""

import sys

from runner.cli.cache import main

if __name__ == "__main__":
    sys.exit(main())
