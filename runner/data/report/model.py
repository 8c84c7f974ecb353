"""The parts of a dataset report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from runner.core.text import counted, named
from runner.data.report.image_statistics import ImageStatistics
from runner.data.select import SelectedItem, Shape


@dataclass(frozen=True)
class Tokens:
    """Length of a caption with the end of its template, in the text encoder's tokens."""

    count: int
    exact: bool  # False for an estimate, made when the tokenizer is not on this computer


@dataclass(frozen=True)
class ReportedItem:
    """An item of the run with its report figures.

    Attributes:
        item: the item.
        scale: the factor by which it is enlarged (over 1) or shrunk to cover its bucket.
        cut: the fraction of its area that is then cropped off.
        used: the ranges of decoded frames (first, last + 1) that a clip's crops cover; empty for a
            picture.
        statistics: None when it could not be read.
    """

    item: SelectedItem
    scale: float
    cut: float
    used: tuple[tuple[int, int], ...]
    statistics: ImageStatistics | None

    @property
    def name(self) -> str:
        """The path inside its source."""
        return self.item.media.name

    @property
    def frames_used(self) -> int:
        """The number of frames that crops cover."""
        return sum(end - start for start, end in self.used)


@dataclass(frozen=True)
class SourceCounts:
    """The figures of one source; ``seconds`` assumes 24 frames per second for unknown rates."""

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
    """The samples of one shape in an epoch, and the batches that they form."""

    shape: Shape
    samples: int
    batch_size: int

    @property
    def count(self) -> int:
        """The number of batches."""
        return -(-self.samples // self.batch_size)

    @property
    def last(self) -> int:
        """The number of samples in the last batch if it is not full, else 0."""
        return self.samples % self.batch_size


@dataclass(frozen=True)
class LeftOut:
    """A media file that is not trained on, and why."""

    source: int
    name: str
    why: str


@dataclass(frozen=True)
class Case:
    """One instance of a finding: the media (indices into ``Report.media``), and a note on them."""

    media: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that the user should know about the dataset.

    Attributes:
        category: its kind, which is an anchor in the HTML.
        text: what it is.
        names: a few names of the media.
        serious: whether it is worth a notice.
        cases: the media, one case each.
    """

    category: str
    text: str
    names: str
    serious: bool
    cases: tuple[Case, ...]

    @property
    def line(self) -> str:
        """Text and names as one sentence."""
        return f"{self.text}: {self.names}."


@dataclass(frozen=True)
class Report:
    """Everything that the page and the HTML show; the worst findings come first."""

    sources: tuple[SourceCounts, ...]
    media: tuple[ReportedItem, ...]
    batches: tuple[Batches, ...]
    left_out: tuple[LeftOut, ...]
    notices: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def serious(self) -> tuple[Finding, ...]:
        """The serious findings."""
        return tuple(finding for finding in self.findings if finding.serious)


def finding_each(
    media: Sequence[ReportedItem],
    category: str,
    which: Sequence[int],
    text: str,
    *,
    serious: bool,
    note: Callable[[int], str] = lambda _: "",
) -> Iterator[Finding]:
    """Make one finding about several media, each by itself; none if there are none.

    Args:
        media: all media of the report.
        category: the finding's kind.
        which: the indices of those that it is about, the worst first.
        text: what they are, beginning with "are" or "have".
        serious: whether it is worth a notice.
        note: says in a word how bad the media file of that index is.
    """
    if not which:
        return
    cases = tuple(Case((index,), note(index)) for index in which)
    shown = [
        media[index].name + (f" ({case.note})" if case.note else "")
        for index, case in zip(which, cases, strict=True)
    ]
    if len(which) == 1:
        text = re.sub("^have ", "has ", re.sub("^are ", "is ", text))
    kinds = {media[index].item.media_kind for index in which}
    noun = "picture" if kinds == {"image"} else "clip"
    what = f"{len(which)} media" if len(kinds) > 1 else counted(len(which), noun)
    yield Finding(category, f"{what} {text}", named(shown, 3), serious, cases)
