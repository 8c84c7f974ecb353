"""Balance regularisation sets against the other sources; pure.

A regularisation set shows the model other examples of the subject's class, so that it does not
forget the class. What matters is the set's share of an epoch, whatever its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from runner.core.errors import UserError
from runner.core.text import counted
from runner.data.select import SelectedItem, Selection, Source


def weigh(sources: Sequence[Source], selection: Selection) -> tuple[tuple[Source, ...], Selection]:
    """Apply the weight of each regularisation source.

    Its samples (pictures and crops) in an epoch are to be ``weight`` times those of all other
    sources together, as closely as whole repeats allow. From a larger set a part of the items is
    taken, chosen by content hash: reproducible, and growing with the weight.

    Returns:
        The sources with their repeats, and the selection without the items that are not taken.

    Raises:
        UserError: there is nothing else to train on.
    """
    if not any(source.options.regularisation for source in sources):
        return tuple(sources), selection
    held_out = {item.media.sha256 for item in selection.items if item.held_out}
    others = _ordinary_samples(sources, selection)
    if not others and held_out:
        raise UserError(
            "dataset.validation_fraction holds out all items except those of regularisation sets: "
            "lower it."
        )
    if not others:
        raise UserError(
            "Only regularisation sets have media to train on: add a source that is not a "
            "regularisation set."
        )
    weighed, notices = list(sources), list(selection.notices)
    kept = [item for item in selection.items if not _is_regularisation(sources, item)]
    for index, source in enumerate(sources):
        # Do not train on media that another source holds out.
        items = [
            item
            for item in selection.items
            if item.source == index and item.media.sha256 not in held_out
        ]
        if not source.options.regularisation or not items:
            continue
        taken, repeats = _choose(items, source.options.weight * others)
        kept += taken
        weighed[index] = replace(source, options=replace(source.options, num_repeats=repeats))
        samples = repeats * sum(_samples(item) for item in taken)
        notices.append(
            f"regularisation: {source.path}, {len(taken)} of {counted(len(items), 'item')} "
            f"x{repeats} = {counted(samples, 'sample')} beside {others}."
        )
    ids = {item.id for item in kept}
    in_order = tuple(item for item in selection.items if item.id in ids)
    return tuple(weighed), Selection(in_order, tuple(notices))


def _is_regularisation(sources: Sequence[Source], item: SelectedItem) -> bool:
    return sources[item.source].options.regularisation


def _ordinary_samples(sources: Sequence[Source], selection: Selection) -> int:
    """Count the samples of an epoch that are not of a regularisation set."""
    return sum(
        _samples(item) * sources[item.source].options.num_repeats * item.repeats
        for item in selection.items
        if not item.held_out and not _is_regularisation(sources, item)
    )


def _samples(item: SelectedItem) -> int:
    """Count the samples of one item without repeats: 1 for a picture, else a clip's crops."""
    return max(1, len(item.crops))


def _choose(items: Sequence[SelectedItem], wanted: float) -> tuple[list[SelectedItem], int]:
    """Choose the items and repeats that come closest to so many samples; at least one item."""
    total = sum(_samples(item) for item in items)
    if total <= wanted:
        below = int(wanted / total) if total else 1
        nearer = below if wanted - below * total <= (below + 1) * total - wanted else below + 1
        return list(items), nearer
    taken: list[SelectedItem] = []
    samples = 0
    for item in sorted(items, key=_draw):
        if taken and abs(samples + _samples(item) - wanted) > abs(samples - wanted):
            break
        taken.append(item)
        samples += _samples(item)
    return taken, 1


def _draw(item: SelectedItem) -> str:
    # Not the digest itself, which decides already what is held out.
    parts = f"regularisation\0{item.media.sha256}\0{item.caption}"
    return hashlib.sha256(parts.encode()).hexdigest()
