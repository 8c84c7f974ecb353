"""How often regularisation sets are seen beside what is trained on; pure.

A regularisation set shows the model what its subject's kind looks like otherwise, so that it does
not forget. Its share is what matters, whatever its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from runner.core.errors import UserError
from runner.core.text import counted
from runner.data.select import SelectedItem, Selection, Source


def weigh(sources: Sequence[Source], selection: Selection) -> tuple[tuple[Source, ...], Selection]:
    """Bring each regularisation source to its weight.

    Its samples (pictures and crops) of an epoch come as near to ``weight`` times those of all
    ordinary sources together as whole repeats allow. A set that is larger than that gives a part
    of its items, chosen by content: the same each time, and for a larger weight those and more.
    Raises :class:`UserError` when there is nothing else to train on.
    """
    if not any(source.options.regularisation for source in sources):
        return tuple(sources), selection
    held_out = {item.media.sha256 for item in selection.items if item.held_out}
    others = _ordinary_samples(sources, selection)
    if not others and held_out:
        raise UserError(
            "dataset.validation_fraction holds out all items but those of regularisation sets: "
            "lower it."
        )
    if not others:
        raise UserError(
            "Only regularisation sets have media to train on: give a source that is none."
        )
    weighed, notices = list(sources), list(selection.notices)
    kept = [item for item in selection.items if not _is_regularisation(sources, item)]
    for index, source in enumerate(sources):
        # What another source holds out must not be trained on by this way.
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
    """The samples of an epoch that are of no regularisation set."""
    return sum(
        _samples(item) * sources[item.source].options.num_repeats
        for item in selection.items
        if not item.held_out and not _is_regularisation(sources, item)
    )


def _samples(item: SelectedItem) -> int:
    """What one item is in an epoch without repeats: a picture, or the crops of a clip."""
    return max(1, len(item.crops))


def _choose(items: Sequence[SelectedItem], wanted: float) -> tuple[list[SelectedItem], int]:
    """The items and repeats that come nearest to so many samples; at least one item."""
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
    # Not the digest itself, by which items are held out.
    parts = f"regularisation\0{item.media.sha256}\0{item.caption}"
    return hashlib.sha256(parts.encode()).hexdigest()
