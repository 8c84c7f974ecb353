"""``python -m runner.ui``: the MLflow UI on the runs, for this computer only."""

import sys

from runner.cli.ui import main

if __name__ == "__main__":
    sys.exit(main())
