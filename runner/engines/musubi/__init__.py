"""musubi-tuner, in an environment of its own."""
