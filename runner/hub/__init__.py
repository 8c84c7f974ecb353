"""Files from the Hugging Face hub, kept in the cache that all its clients share.

``cache`` reads and fills that cache, ``remote`` asks the hub, ``fetch`` brings what is missing;
``python -m runner.hub`` is the weights stage's command. huggingface_hub does the talking (headers,
tokens, redirects, retries); what is ours is a download that goes on where it was cut, and whose
bytes are compared with their digest. docs/development/hub.md has what each does, tested.
"""
