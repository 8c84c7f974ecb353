"""The embedded engine: every stage from diffusers, transformers and torch alone."""
