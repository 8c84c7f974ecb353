"""Sources of media: an archive, a folder, a JSONL file, a dataset of the Hugging Face hub, or
the runner's own sample.

Archives are not trusted: :func:`check_archive` checks all members before anything is written.
PIL and PyAV are imported where they are used, so that importing this package is quick.
"""

from runner.data.sources.locate import SAMPLE, locate
from runner.data.sources.model import Scan, SourceMedia
from runner.data.sources.open_archive import check_archive
from runner.data.sources.scan import scan
from runner.data.sources.write import check_unchanged, unpack

__all__ = (
    "SAMPLE",
    "Scan",
    "SourceMedia",
    "check_archive",
    "check_unchanged",
    "locate",
    "scan",
    "unpack",
)
