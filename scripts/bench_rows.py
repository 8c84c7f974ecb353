"""The rows of the bench: what each one runs, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["references", "train", "evaluate", "latents", "captions"]

# What runner's memory options give musubi-tuner for a GPU of that many GB (conf/memory). For 8 GB
# it has none: as for 12, with as many blocks swapped as musubi-tuner can.
_FP8 = {"fp8_base": True, "fp8_scaled": True}
_SWAP: dict[int, dict[str, Any]] = {
    24: {"blocks_to_swap": 8},
    16: {"blocks_to_swap": 34, "block_swap_h2d_only": True},
    12: {"blocks_to_swap": 48, "block_swap_h2d_only": True, **_FP8},
    8: {"blocks_to_swap": 51, "block_swap_h2d_only": True, **_FP8},
}
LIMITS = (24, 16, 12, 8)


@dataclass(frozen=True)
class Row:
    """One row of the table, which one process measures.

    Attributes:
        name: by which it is chosen; musubi-tuner's begin with ``musubi-``.
        kind: what is run.
        works: what it trains on or encodes.
        options: options of train.toml besides the usual ones.
        limit: GB that it may use, 0.5 GiB less by the driver; None for no limit.
        must: what must be reached, in seconds; ``half`` is half of musubi-tuner's.
        goal: the goal, likewise.
        steps: steps to take at most, if it is not to be as many as the others.
    """

    name: str
    kind: Kind
    works: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    must: str = ""
    goal: str = ""
    steps: int | None = None

    @property
    def musubi(self) -> bool:
        """Whether musubi-tuner runs it."""
        return self.name.startswith("musubi-")

    @property
    def encodes(self) -> bool:
        """Whether it encodes media or captions."""
        return self.kind in ("latents", "captions")

    @property
    def work(self) -> str:
        """What it trains on."""
        return self.works[0]


def _rows() -> list[Row]:
    compiled: dict[str, Any] = {"compile": True}
    theirs = {**compiled, "compile_cache_size_limit": 32}
    rows = [
        Row("references", "references", ("image", "clip")),
        Row("references-i2v", "references", ("i2v",)),
        Row("musubi-references", "references", ("image", "clip", "i2v")),
        Row("clip", "train", ("clip",), compiled, must="1.2", goal="1.0"),
        # The first row compiles; this one finds its code.
        Row("clip-again", "train", ("clip",), compiled, steps=4),
    ]
    # What an H100 has: not everything can be kept there.
    rows.append(Row("clip-80gb", "train", ("clip",), compiled, limit=80, must="1.2", goal="1.0"))
    clips = {24: "1.3", 16: "1.3", 12: "1.4", 8: "1.5"}
    rows += [
        Row(f"clip-{limit}gb", "train", ("clip",), compiled,
            limit=limit, must=clips[limit], goal="1.15")
        for limit in LIMITS
    ]  # fmt: skip
    rows.append(Row("image", "train", ("image",), compiled, must="0.15", goal="0.08"))
    rows += [
        Row(f"image-{limit}gb", "train", ("image",), compiled,
            limit=limit, must="half", goal="0.2")
        for limit in LIMITS
    ]  # fmt: skip
    unscaled: dict[str, Any] = {**compiled, "i2v_unscaled_condition": True}
    rows += [
        Row("i2v", "train", ("i2v",), unscaled, must="+5 %", goal="0"),
        Row("large-24gb", "train", ("large",), compiled, limit=24, must="runs", steps=7),
        Row("image-uncompiled", "train", ("image",)),
        Row("clip-uncompiled", "train", ("clip",)),
        Row("evaluate", "evaluate", ("image", "clip")),
        Row("latents-image", "latents", ("image",), must="0.06"),
        Row("latents-clip", "latents", ("clip",), must="0.95"),
        Row("captions", "captions", ("image",), must="twice"),
    ]
    for work in ("clip", "image"):
        rows += [
            Row(f"musubi-{work}", "train", (work,)),
            Row(f"musubi-{work}-compiled", "train", (work,), theirs),
        ]
        rows += [
            Row(f"musubi-{work}-{limit}gb", "train", (work,), options, limit=limit)
            for limit, options in _SWAP.items()
        ]
    rows += [
        Row("musubi-i2v", "train", ("i2v",)),
        Row("musubi-latents-image", "latents", ("image",)),
        Row("musubi-latents-clip", "latents", ("clip",)),
        Row("musubi-captions", "captions", ("image",)),
    ]
    return rows


ROWS = {row.name: row for row in _rows()}
