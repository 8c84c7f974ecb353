"""Declarative, comparable HunyuanVideo 1.5 LoRA training runs."""

__version__ = "0.2.0"
