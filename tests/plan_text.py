"""What an engine is given by a plan, as text, and the difference of two such texts."""

from __future__ import annotations

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


def difference(base: Plan, plan: Plan) -> str:
    """What ``plan`` has otherwise than ``base``: the headings, and the lines gone and come.

    Of a section that is gone there is its heading alone. Line numbers and lines that are the same
    are left out, so that what changes both plans changes no difference.
    """
    before, after = sections(base), sections(plan)
    lines: list[str] = []
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            lines.append(f"-{before[key][0]}")
        elif before.get(key) != after[key]:
            lines += _changes(before.get(key), after[key])
    return "".join(f"{line}\n" for line in lines)


def _changes(before: tuple[str, str] | None, after: tuple[str, str]) -> list[str]:
    heading, text = after
    assert text.endswith("\n") or not text
    if before is None:
        return [f"+{line}" for line in (heading, *text.splitlines())]
    lines = [heading] if before[0] == heading else [f"-{before[0]}", f"+{heading}"]
    found = unified_diff(before[1].splitlines(), text.splitlines(), n=0, lineterm="")
    return lines + [line for line in list(found)[2:] if not line.startswith("@@")]
