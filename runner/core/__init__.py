"""Errors, text, files and processes, used by all other packages; nothing about training."""
