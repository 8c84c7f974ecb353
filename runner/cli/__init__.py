"""The command line: `python -m runner` and the commands beside it."""
