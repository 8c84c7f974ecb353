"""Repeats that kohya's trainer takes from the names of folders, such as ``10_ohwx dog``; pure.

Its README calls the form ``<repeats>_<name>``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping

from runner.core.text import named, printable

_FORM = re.compile(r"(\d{1,9})_.+")
# A larger number is a year, or a date, and not meant as repeats.
_MOST = 100


def repeats_of_folders(media: Iterable[str]) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """Return the repeats of each folder of media, and a notice if any name has the form.

    They are taken only if all folders of media have the form, with 1 to 100 repeats each;
    otherwise there are none.
    """
    folders = sorted({posixpath.dirname(name) for name in media})
    forms = {folder: _FORM.fullmatch(posixpath.basename(folder)) for folder in folders}
    numbers = {folder: int(form[1]) for folder, form in forms.items() if form}
    if not numbers:
        return {}, ()
    reason = ""
    if others := [folder or "the folder of the source" for folder in folders if not forms[folder]]:
        reason = f"{named(map(printable, others), 3)} has no such name"
    elif wrong := [folder for folder, number in numbers.items() if not 1 <= number <= _MOST]:
        reason = f"{named(map(printable, wrong), 3)} is not 1 to {_MOST} repeats"
    if reason:
        names = named(map(printable, numbers), 3)
        return {}, (
            f"The numbers in the names of folders ({names}) are not taken as repeats, since "
            f"{reason}: rename the folders, or set num_repeats for each in dataset.sources.",
        )
    listed = named([f"{printable(f)} x{number}" for f, number in numbers.items()], 20)
    return numbers, (f"Repeats are taken from the names of folders: {listed}.",)
