"""``python -m runner.engines.musubi_install install``: the public name of the installer."""

import sys

from runner.engines.musubi.install import main

if __name__ == "__main__":
    sys.exit(main())
