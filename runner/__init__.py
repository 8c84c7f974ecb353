"""Declarative, comparable HunyuanVideo 1.5 LoRA training runs."""

__version__ = "0.1.0"
