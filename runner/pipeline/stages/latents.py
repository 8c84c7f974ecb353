"""The latents stage: every item's latents in the run's cache folder, encoded or found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner.pipeline.stages.caching import fill_and_link

if TYPE_CHECKING:
    from runner.pipeline.executor import Context


def run(context: Context) -> None:
    """See :func:`runner.pipeline.stages.caching.fill_and_link`."""
    fill_and_link(context, "latents")
