"""What a dataset report is made of."""

from __future__ import annotations

from dataclasses import dataclass

from runner.data.report.image_statistics import ImageStatistics
from runner.data.select import SelectedItem, Shape


@dataclass(frozen=True)
class Tokens:
    """Length of a caption with the end of its template, in the text encoder's tokens."""

    count: int
    exact: bool  # False for an estimate, made when the tokenizer is not on this machine


@dataclass(frozen=True)
class ReportedItem:
    """One item of the run.

    scale: how much it is enlarged (over 1) or shrunk to cover its bucket. cut: the share of its
    area that the bucket then cuts off. used: the runs of decoded frames (first, past the last)
    that a clip's crops cover; empty for a picture. look: None when it could not be looked at.
    """

    item: SelectedItem
    scale: float
    cut: float
    used: tuple[tuple[int, int], ...]
    statistics: ImageStatistics | None

    @property
    def name(self) -> str:
        return self.item.media.name

    @property
    def frames_used(self) -> int:
        return sum(end - start for start, end in self.used)


@dataclass(frozen=True)
class SourceCounts:
    """What one source gives. `seconds` counts a clip of unknown rate as 24 frames a second."""

    path: str
    kind: str
    pictures: int
    clips: int
    held_out: int
    crops: int
    repeats: int
    samples: int  # in an epoch, repeats included, held-out items not
    bytes: int
    seconds: float
    left_out: int


@dataclass(frozen=True)
class Batches:
    """The samples of one shape in an epoch, and the batches they make; `last` is a partial one."""

    shape: Shape
    samples: int
    batch_size: int

    @property
    def count(self) -> int:
        return -(-self.samples // self.batch_size)

    @property
    def last(self) -> int:
        """Samples in the last batch when it is not full, else 0."""
        return self.samples % self.batch_size


@dataclass(frozen=True)
class LeftOut:
    """A medium that is not trained on, and why."""

    source: int
    name: str
    why: str


@dataclass(frozen=True)
class Case:
    """One instance of a finding: the media it is about (indices into `Report.media`), and how."""

    media: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Something a person should know: what it is, and a few names of what it is about.

    The `serious` ones are worth a notice.
    """

    category: str
    text: str
    names: str
    serious: bool
    cases: tuple[Case, ...]

    @property
    def line(self) -> str:
        return f"{self.text}: {self.names}."


@dataclass(frozen=True)
class Report:
    """Everything the page and the HTML show; findings are sorted, the worst first."""

    sources: tuple[SourceCounts, ...]
    media: tuple[ReportedItem, ...]
    batches: tuple[Batches, ...]
    left_out: tuple[LeftOut, ...]
    notices: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def serious(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.serious)
