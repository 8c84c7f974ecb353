"""Readers, writers and converters of the files between stages; pure."""
