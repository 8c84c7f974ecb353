"""Corrections that make a run train on media as a person sees them, not as they are stored."""
