"""Make a plan from inputs and an engine; pure.

A plan holds everything a run does: the stages in order with their exact commands, the files that
the runner writes for them, their outputs, and whether these exist already. A dry run prints the
same object that a real run executes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runner.config.schema import RunConfig
from runner.core.errors import UserError
from runner.core.text import printable
from runner.data.select import dataset_fingerprint, most_trained_size, shapes
from runner.engines.base import Engine
from runner.formats import train_toml
from runner.formats.dataset_toml import render as render_dataset
from runner.formats.train_options import Rendering, train_options
from runner.pipeline.model import Inputs, Plan, Planning, StagePlan
from runner.pipeline.stages import STAGES, skipped
from runner.pipeline.tables import tables


def default_name(config: RunConfig) -> str:
    """Return the name of a run for which none is given."""
    return f"{config.task.name}-{config.network.name}{config.network.rank}-{config.optimizer.name}"


def make_plan(inputs: Inputs, engine: Engine) -> Plan:
    """Plan a run. Equal arguments give equal plans.

    Raises:
        UserError: the options are impossible with this GPU or dataset.
    """
    config, job = inputs.config, inputs.job
    name = config.name or default_name(config)
    compiled, compile_note = engine.compiles(job, inputs.gpu)
    per_epoch = steps_per_epoch(inputs)
    total = config.training.max_steps or config.training.epochs * per_epoch
    clips = any(item.media_kind == "video" for item in inputs.selection.items)
    for problem in engine.plan_problems(job, inputs.gpu, steps=total, clips=clips):
        raise UserError(problem)
    options = train_options(
        Rendering(
            config=config,
            weights=inputs.weights.paths,
            memory=inputs.memory,
            name=name,
            resolution=most_trained_size(inputs.sources, inputs.selection),
            seed=inputs.seed,
            compile_blocks=compiled,
            engine_only=engine.own_options,
        )
    )
    left_out = skipped(config)
    missing = {
        stage.name: why for stage in STAGES if (why := stage.missing_from(engine, job)) is not None
    }
    offered = [stage for stage in STAGES if stage.name not in missing]
    planning = Planning(
        inputs,
        engine,
        options,
        total,
        epochs=math.ceil(total / per_epoch),
        needed=frozenset(n for s in offered if s.name not in left_out for n in s.needs),
    )
    stages = tuple(
        _apply_skip_and_force(config, stage.plan(planning), left_out) for stage in offered
    )
    notices = [
        *inputs.selection.notices,
        *engine.plan_notices(job, inputs.gpu, steps=total, clips=clips),
        *(
            note
            for note in (inputs.engine.notice, inputs.memory_note, inputs.lora_note, compile_note)
            if note
        ),
        *inputs.state_notices,
        *(why for stage, why in missing.items() if stage not in config.stages.skip),
        *(notice for stage in stages for notice in stage.notices),
    ]
    return Plan(
        name=name,
        stages=stages,
        files=tuple(_files(inputs, engine, options)),
        steps=total,
        steps_per_epoch=per_epoch,
        epochs=planning.epochs,
        notices=tuple(notices),
        fingerprint=dataset_fingerprint(inputs.selection.items),
    )


def _apply_skip_and_force(
    config: RunConfig, stage: StagePlan, left_out: frozenset[str]
) -> StagePlan:
    if stage.name in left_out:
        return replace(stage, state="skipped")
    if stage.name in config.stages.force and stage.state == "done":
        return replace(stage, state="to run")
    return stage


def _files(inputs: Inputs, engine: Engine, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the files that the commands read, except those that single stages write."""
    config = inputs.config
    files = [("dataset.toml", render_dataset(tables(inputs, held_out=False)))]
    files += engine.files(inputs.job, options).items()
    if inputs.selection.has_held_out:
        files.append(("validation.toml", render_dataset(tables(inputs, held_out=True))))
    if config.sampling.name == "prompts":
        prompts = train_toml.sample_prompts(config, config.sampling.image_path)
        files.append(("sample_prompts.txt", prompts))
    return files


def steps_per_epoch(inputs: Inputs) -> int:
    """Count the optimizer steps of an epoch: batches of equal shape, over gradient accumulation."""
    batches = sum(
        math.ceil(count / inputs.sources[shape.source].options.batch_size)
        for shape, count in shapes(inputs.sources, inputs.selection).items()
    )
    return max(1, math.ceil(batches / inputs.config.training.gradient_accumulation_steps))


def commands_sh(plan: Plan) -> str:
    """Write a shell script that repeats the plan's commands in the run's folder."""
    lines = ["#!/bin/sh", f"# {printable(plan.name)}: what was run, in order.", "set -e"]
    lines.append('cd "$(dirname "$0")"')
    for stage in plan.stages:
        lines += ["", f"# {stage.name}: {printable(stage.summary)} ({stage.state})"]
        if stage.without_commands:
            lines.append(f"# The runner itself {stage.without_commands}.")
        if stage.to_run:
            lines += [command.shell() for command in stage.commands]
    return "\n".join(lines) + "\n"
