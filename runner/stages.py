"""``python -m runner.stages.convert``, as the ``commands.sh`` of runs calls it."""

from pathlib import Path

# Makes this module a package whose modules are those of the stages.
__path__ = [str(Path(__file__).parent / "pipeline" / "stages")]
