"""RunConfig and facts in, Plan out; pure.

A plan holds everything a run does: ordered stages with their exact commands, the files they read
that the runner writes, what they make, and whether that is there already. A dry run prints the
very object that a real run executes.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from runner.config.rules import STAGES
from runner.config.schema import RunConfig
from runner.core.command import Command
from runner.core.errors import UserError
from runner.core.text import counted
from runner.data.select import dataset_fingerprint, shapes
from runner.engines.base import Engine
from runner.engines.musubi import rules as rules_musubi
from runner.formats import train_toml
from runner.formats.dataset_toml import render as render_dataset
from runner.formats.train_options import Rendering, train_options
from runner.pipeline.model import Facts, Plan, Stage
from runner.pipeline.plan_data import dataset_stage, entries, latents_stage, text_stage
from runner.storage.store import key_of


def default_name(config: RunConfig) -> str:
    """A run's name when none is given."""
    return f"{config.task.name}-{config.network.name}{config.network.rank}-{config.optimizer.name}"


def make_plan(config: RunConfig, facts: Facts, engine: Engine) -> Plan:
    """The plan of a run. The same arguments give an equal plan.

    Raises :class:`UserError` for options that the data make impossible.
    """
    compiled, compile_note = engine.compiles(config, facts.memory, facts.machine)
    per_epoch = steps_per_epoch(config, facts)
    total = config.training.max_steps or config.training.epochs * per_epoch
    clips = any(item.kind == "video" for item in facts.selection.items)
    eight_bit = config.optimizer.type.lower().endswith("8bit")
    if config.engine.name == "diffusers" and eight_bit and facts.machine is None:
        raise UserError(
            f"optimizer={config.optimizer.name} needs an NVIDIA card, and none was found: take "
            "optimizer=adamw."
        )
    notices = [*facts.selection.notices]
    if config.engine.name == "musubi":
        for problem in rules_musubi.plan_problems(config, facts.memory, steps=total, clips=clips):
            raise UserError(problem)
        notices += rules_musubi.plan_notices(config, steps=total)
    notices += [note for note in (facts.memory_note, compile_note) if note]
    if config.engine.name == "musubi" and "evaluate" not in config.stages.skip:
        notices.append("engine=musubi has no evaluate stage yet: there will be no eval/loss.")
    if config.network.name == "lokr":
        notices.append(
            "network=lokr: ComfyUI has q, k and v in one layer, which three Kronecker products "
            "don't make, so they are written out whole: 2.7 GB of bf16 if all are trained."
        )
    own = {"i2v_unscaled_condition"} if config.engine.name == "diffusers" else {}
    options = train_options(
        Rendering(
            config=config,
            weights=facts.weights.paths,
            memory=facts.memory,
            name=config.name or default_name(config),
            seed=facts.seed,
            compile_blocks=compiled,
            own=frozenset(own),
        )
    )
    files: list[tuple[str, str]] = [
        ("dataset.toml", render_dataset(entries(facts, held_out=False))),
        *engine.files(config).items(),
    ]
    if config.engine.arguments == "file":
        files.insert(1, ("train.toml", train_toml.render(options)))
    if facts.selection.has_held_out:
        files.append(("validation.toml", render_dataset(entries(facts, held_out=True))))
    if config.sampling.name == "prompts":
        files.append(
            ("sample_prompts.txt", train_toml.sample_prompts(config, config.sampling.image_path))
        )
    stages = [
        _weights(facts),
        dataset_stage(config, facts),
        latents_stage(config, facts, engine),
        text_stage(config, facts, engine),
        Stage(
            "train",
            counted(total, "step"),
            "to run",
            commands=(engine.train(config, options),),
            outputs=("checkpoints/lora.safetensors", "lora.safetensors"),
        ),
        _convert(facts),
        *_evaluate(config, facts, engine),
    ]
    assert [stage.name for stage in stages] == [n for n in STAGES if n in {s.name for s in stages}]
    return Plan(
        name=config.name or default_name(config),
        stages=tuple(_with_wishes(config, stage) for stage in stages),
        files=tuple(files),
        steps=total,
        steps_per_epoch=per_epoch,
        epochs=math.ceil(total / per_epoch),
        notices=tuple(notices),
        fingerprint=dataset_fingerprint(facts.selection.items),
    )


def _with_wishes(config: RunConfig, stage: Stage) -> Stage:
    without_lora = "train" in config.stages.skip and stage.name in ("convert", "evaluate")
    if stage.name in config.stages.skip or without_lora:
        return replace(stage, state="skipped")
    if stage.name in config.stages.force and stage.state == "done":
        return replace(stage, state="to run")
    return stage


def steps_per_epoch(config: RunConfig, facts: Facts) -> int:
    """Optimizer steps in an epoch: batches of equal shape, over gradient accumulation."""
    counts = shapes(facts.sources, facts.selection)
    batches = sum(
        math.ceil(count / facts.sources[shape.source].options.batch_size)
        for shape, count in counts.items()
    )
    return max(1, math.ceil(batches / config.training.gradient_accumulation_steps))


def samples_per_epoch(facts: Facts) -> int:
    """Pictures and crops seen in an epoch, repeats included."""
    return sum(shapes(facts.sources, facts.selection).values())


def _weights(facts: Facts) -> Stage:
    return Stage(
        "weights",
        facts.weights.summary,
        "done" if facts.weights.present else "to run",
        commands=facts.weights.commands,
        outputs=(facts.weights.paths.transformer,),
    )


def _convert(facts: Facts) -> Stage:
    command = Command(
        (
            *(facts.python, "-m", "runner.stages.convert"),
            *("lora.safetensors", "lora_comfyui.safetensors"),
        ),
        set_env=(("PYTHONPATH", facts.python_path),) if facts.python_path else (),
    )
    return Stage(
        "convert",
        "lora_comfyui.safetensors",
        "to run",
        commands=(command,),
        outputs=("lora_comfyui.safetensors",),
    )


def _evaluate(config: RunConfig, facts: Facts, engine: Engine) -> list[Stage]:
    held_out = facts.selection.has_held_out
    command = engine.evaluate(config, "validation.toml" if held_out else "dataset.toml")
    if command is None:
        return []
    # Each crop of a clip has a loss of its own.
    number = sum(
        max(1, len(item.crops)) for item in facts.selection.items if item.held_out == held_out
    )
    which = "held-out" if held_out else "training"
    return [
        Stage(
            "evaluate",
            f"eval/loss on {counted(number, f'{which} item')}",
            "to run",
            commands=(command,),
            missing=number,
            outputs=("evaluation.json",),
        )
    ]


def commands_sh(plan: Plan) -> str:
    """A script that runs the plan's commands by hand, in the run's folder."""
    lines = ["#!/bin/sh", f"# {plan.name}: what was run, in order.", "set -e"]
    lines.append('cd "$(dirname "$0")"')
    for stage in plan.stages:
        lines += ["", f"# {stage.name}: {stage.summary} ({stage.state})"]
        if not stage.to_run:
            continue
        lines += [command.shell() for command in stage.commands]
        if stage.name == "train":
            # The place may be a second name of the very file, which cp would refuse.
            lines.append("rm -f lora.safetensors")
            lines.append("cp checkpoints/lora.safetensors lora.safetensors")
    return "\n".join(lines) + "\n"


def config_fingerprint(resolved: dict[str, Any]) -> str:
    """A digest of what decides the result: name, tracking, output_dir and dry_run left out."""
    kept = {k: v for k, v in resolved.items() if k not in ("name", "tracking", "output_dir")}
    kept.pop("dry_run", None)
    return key_of(json.loads(json.dumps(kept, default=str)))[:16]
