"""Files from the Hugging Face hub, in the Hugging Face cache that all its clients share.

``hub_cache`` reads and fills that cache, ``remote`` asks the hub, ``fetch`` downloads what is
missing; ``python -m runner.hub`` is the weights stage's command. huggingface_hub handles headers,
tokens, redirects and retries; this package adds downloads that resume and are verified against
their hash. docs/development/hub.md describes what each of the two does, as tested.
"""
