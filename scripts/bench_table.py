"""The bench's table."""

from __future__ import annotations

from typing import Any

import check_common as common
from bench_rows import ROWS, Row

_UNDER = 0.5  # GiB that a row must stay under its limit


def line(row: Row, found: dict[str, Any]) -> str:
    """Say in one line what was measured of a row."""
    cells = zip(HEAD, cells_of(row, found, {}), strict=True)
    return "; ".join(f"{name} {cell}" if name != "row" else cell for name, cell in cells if cell)


HEAD = ("row", "s a step", "musubi-tuner", "must reach", "goal", "GiB by the driver",
        "GiB reserved", "s to the first step", "worst gradient: ours; musubi-tuner",
        "result")  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table, and what they were measured on.

    Rows of ours that were not measured are there too, and say so.
    """
    rows = []
    for row in ROWS.values():
        if row.kind == "references":
            continue
        if row.name in results:
            rows.append(cells_of(row, results[row.name], results))
        elif not row.musubi:
            rows.append((row.name, "", _musubi(row, results), row.must, row.goal,
                         *[""] * (len(HEAD) - 6), "not run"))  # fmt: skip
    machines = sorted({
        f"{r['machine']}, driver {r['driver']}, {r['date']}, commit {r['commit']}"
        for r in results.values()
    })  # fmt: skip
    return "\n".join([common.table(HEAD, rows), *machines])


def cells_of(row: Row, found: dict[str, Any], results: dict[str, Any]) -> tuple[str, ...]:
    """Return a row's cells."""
    median = found.get("median")
    step = "" if median is None else f"{median:.3f}"
    if row.kind == "evaluate" and found["failure"] is None:
        step = f"{found['seconds']:.0f} in all"
    if "each" in found:
        step = f"{found['each']:.3f} each"
    driver = found.get("driver_bytes")
    use = "" if driver is None else f"{driver / 2**30:.2f}"
    reserved = found.get("reserved")
    first = found.get("first_step")
    return (
        row.name,
        step,
        _musubi(row, results),
        row.must,
        row.goal,
        use,
        f"{reserved / 2**30:.2f}" if reserved else "",
        "" if first is None or row.kind != "train" else f"{first:.1f}",
        _gradients(found.get("gradients")),
        _result(row, found, results),
    )


def _musubi(row: Row, results: dict[str, Any]) -> str:
    """Return musubi-tuner's figures for the same work: as it is, compiled or with its settings."""
    if row.musubi:
        return ""
    found = []
    for name in (f"musubi-{row.name}", f"musubi-{row.name}-compiled"):
        value = results.get(name, {}).get("median") or results.get(name, {}).get("each")
        if value is not None:
            found.append(f"{value:.3f}" + (" compiled" if name.endswith("compiled") else ""))
    return "; ".join(found)


def _gradients(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["clipped"]:
        return "clipped, not comparable"
    parts = [f"{found[side]['ratio']:.2f}" for side in ("ours", "musubi") if side in found]
    return "; ".join(parts) + f" ({found['worst']:.4f} at most)"


def _result(row: Row, found: dict[str, Any], results: dict[str, Any]) -> str:
    parts = []
    driver = found.get("driver_bytes")
    if found["failure"] is not None:
        parts.append(f"FAILED: {found['failure']}")
    if row.kind == "train" and not row.musubi and "gradients" not in found:
        parts.append("gradients not checked")
    ours = found.get("gradients", {}).get("ours")
    if ours is not None and not ours["ratio"] <= 1.5:
        parts.append(f"GRADIENTS WRONG: {ours['tensor']}")
    if row.limit is not None and driver is None:
        parts.append("memory not measured")
    elif row.limit is not None and driver is not None and driver / 2**30 > row.limit - _UNDER:
        parts.append(f"over {row.limit - _UNDER:g} GiB")
    value, bound = found.get("median", found.get("each")), _bound(row, results)
    if bound is None and row.must in ("half", "twice"):
        parts.append("not judged: musubi-tuner was not measured")
    if found["failure"] is None and bound is not None and value is not None:
        parts.append("reached" if value <= bound else "missed")
    return "; ".join(parts)


def _bound(row: Row, results: dict[str, Any]) -> float | None:
    """Return the seconds that must be reached, if they are known."""
    if row.must.replace(".", "").isdigit():
        return float(row.must)
    theirs = results.get(f"musubi-{row.name}", {})
    value = theirs.get("median", theirs.get("each"))
    return value / 2 if value is not None and row.must in ("half", "twice") else None
