"""huggingface_hub's own words (retries, rate limits) go to a log, not to the screen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hub_log(path: Path) -> Iterator[None]:
    """Send the library's log to ``path`` while the block runs."""
    from huggingface_hub.utils import logging as hub_logging

    logger = hub_logging.get_logger("huggingface_hub")
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = list(logger.handlers)
    try:
        logger.handlers = [handler]
        yield
    finally:
        logger.handlers = before
        handler.close()
