"""``python -m runner.cache``: what the shared cache holds; prunes it."""

import sys

from runner.cli.cache import main
from runner.core.unexpected import guarded
from runner.tracking.client import without_secrets

if __name__ == "__main__":
    sys.exit(guarded(main, without_secrets))
