"""Files from the Hugging Face hub, kept in the cache that all its clients share.

``cache`` reads and fills that cache, ``remote`` asks the hub, ``fetch`` brings what is missing;
``python -m runner.hub`` does the same by hand. huggingface_hub does the talking (headers, tokens,
redirects, retries); what is ours is a download that goes on where it was cut: since version 2 its
own starts every file anew (a temporary file of the process, deleted when it fails).
"""
