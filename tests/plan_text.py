"""What an engine is given by a plan, as text, and the difference of two such texts."""

from __future__ import annotations

from collections.abc import Collection
from difflib import unified_diff

from runner.pipeline.model import Plan

# A section's heading and text, by what it is of: a file's name, or a stage's.
Sections = dict[str, tuple[str, str]]


def sections(plan: Plan) -> Sections:
    """The plan's files, and each stage's commands and files, in their order."""
    found: list[tuple[str, str, str]] = [(name, f"== {name}", text) for name, text in plan.files]
    for stage in plan.stages:
        commands = "\n".join(f"{command.shell()}\n" for command in stage.commands)
        heading = f"== {stage.name}: {stage.state}, {stage.summary}"
        found.append((f"stage {stage.name}", heading, f"\n{commands}" if commands else ""))
        found += [(f"{stage.name} {name}", f"-- {name}", text) for name, text in stage.files]
    assert len({key for key, _, _ in found}) == len(found)
    return {key: (heading, text) for key, heading, text in found}


def rendered(plan: Plan) -> str:
    """Everything an engine is given, as one text."""
    return "\n".join(f"{heading}\n{text}" for heading, text in sections(plan).values())


def difference(base: Plan, plan: Plan, shown: Collection[str] = ()) -> str:
    """What ``plan`` has otherwise than ``base``: the headings, and the lines gone and come.

    Of a section that is gone there is its heading alone. Line numbers and lines that are the same
    are left out, so that what changes both plans changes no difference. Options of train.toml that
    are to be ``shown`` are there whatever the base has.
    """
    before, after = sections(base), sections(plan)
    lines: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            lines.append(f"-{before[key][0]}")
        elif before.get(key) != after[key]:
            lines += _changes(before.get(key), after[key], shown)
    return "".join(f"{line}\n" for line in lines)


def _changes(
    before: tuple[str, str] | None, after: tuple[str, str], shown: Collection[str]
) -> list[str]:
    heading, text = after
    assert text.endswith("\n") or not text
    if before is None:
        return [f"+{line}" for line in (heading, *text.splitlines())]
    lines = [heading] if before[0] == heading else [f"-{before[0]}", f"+{heading}"]
    others = [s for s in before[1].splitlines() if s.partition(" = ")[0] not in shown]
    found = unified_diff(others, text.splitlines(), n=0, lineterm="")
    changed = [line for line in list(found)[2:] if not line.startswith("@@")]
    return lines + (_options(changed) if heading.endswith("train.toml") else changed)


def _options(changed: list[str]) -> list[str]:
    """Changed lines of a train.toml, without the values that the other plan has for its options.

    They stand in the whole plan, and a changed default is to change that one and no others.
    """
    come = {line[1:].partition(" = ")[0] for line in changed if line.startswith("+")}
    kept: list[str] = []
    for line in changed:
        key, equals, _ = line[1:].partition(" = ")
        if line.startswith("+") or not equals:
            kept.append(line)
        elif key not in come:
            kept.append(f"-{key}")
    return kept
