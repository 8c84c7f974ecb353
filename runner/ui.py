"""``python -m runner.ui``: the MLflow UI on the runs, for this computer only."""

import sys

from runner.cli.ui import main
from runner.core.unexpected import guarded
from runner.tracking.client import without_secrets

if __name__ == "__main__":
    sys.exit(guarded(main, without_secrets))
