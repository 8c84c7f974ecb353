"""Engines: sets of executables that accept the files between stages."""
