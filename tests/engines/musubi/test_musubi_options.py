"""musubi-tuner accepts what it is given: every command and train.toml against its own options."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Collection, Iterator
from itertools import product

import conftest
import pytest
from conftest import PICTURES_ALONE, TOP, compose, fake_facts, fake_item, plan_of

from runner.config.groups import conf_folder, groups
from runner.core.command import Command
from runner.core.errors import UserError
from runner.engines.base import Gpu
from runner.engines.musubi import packages
from runner.engines.musubi.engine import MusubiEngine
from runner.engines.musubi.rules_arguments import OWNED, REFUSED
from runner.engines.rules_optimizer import SCHEDULERS
from runner.formats.train_options import Rendering, train_options
from runner.formats.train_toml import WeightPaths
from runner.formats.trainer_options import (
    TRAIN,
    arguments_of,
    check_table,
    options,
    parse,
    recorded,
)
from runner.pipeline.model import Plan, StagePlan

GROUPS = groups(conf_folder())
GPU = Gpu("NVIDIA H100", 80.0, (9, 0))
MEDIA = [fake_item("a.jpg"), fake_item("b.png", size=(600, 800)), fake_item("clip.mp4")]


def script_arguments(argv: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """The musubi-tuner script that a command runs and its arguments, or None."""
    for place, word in enumerate(argv):
        if word in ("-m", "--module") and argv[place + 1].startswith("musubi_tuner."):
            name = argv[place + 1].removeprefix("musubi_tuner.") + ".py"
            return name, list(argv[place + 2 :])
    return None


def missing(script: str, names: Collection[str]) -> list[str]:
    """Required options that are not among ``names``."""
    required = [option.name for option in options(script).values() if option.required]
    return [f"{script} needs --{name}." for name in required if name not in names]


def problems_of(argv: tuple[str, ...], files: dict[str, str]) -> list[str]:
    """What the real parsers would refuse, and what they fail to refuse in train.toml."""
    found = script_arguments(argv)
    assert found is not None, argv
    script, arguments = found
    values, problems = parse(script, arguments)
    names = set(values)
    if "config_file" in values:
        table = tomllib.loads(files[values["config_file"]])
        problems += check_table(script, table)
        names |= set(table)
        # A table given as arguments means the same, so either way of passing it can be taken.
        given, wrong = parse(script, arguments_of(script, table))
        assert wrong == []
        assert given == {key: value for key, value in table.items() if value is not False}
    if script == TRAIN:
        # musubi checks these by hand, after reading the file.
        problems += [f"no {name}" for name in ("dit", "dataset_config") if name not in names]
    return problems + missing(script, names)


def check_plan(plan: Plan) -> int:
    """Check every musubi command of a plan; returns how many there were."""
    count = 0
    for name in ("latents", "text", "train"):
        for command in of_musubi(plan.stage(name)):
            assert problems_of(command.argv, dict(plan.files)) == []
            count += 1
    return count


def of_musubi(stage: StagePlan) -> list[Command]:
    """A stage's commands, but for the shell's that keeps the trained file."""
    return [command for command in stage.commands if command.argv[0] != "sh"]


# The data is that of the version that is pinned and installed.
def test_recorded_version_is_the_pinned_one() -> None:
    record = recorded()
    assert record["version"] == packages.VERSION
    assert record["commit"] == "30c658c"
    counts = {script: len(entries) for script, entries in record["scripts"].items()}
    assert counts == {
        "hv_1_5_cache_latents.py": 17,
        "hv_1_5_cache_text_encoder_outputs.py": 9,
        TRAIN: 128,
    }


def golden_commands(text: str) -> Iterator[Command]:
    for line in text.replace("\\\n", " ").splitlines():
        if "musubi_tuner." in line and "bin/python" in line:
            words = shlex.split(line)
            start = next(n for n, word in enumerate(words) if word.endswith("bin/python"))
            yield Command(tuple(words[start:]))


# The golden file a person reads is what musubi-tuner accepts, word for word.
def test_golden_commands_parse() -> None:
    text = (TOP / "tests" / "golden" / "musubi-t2v.txt").read_text()
    train = text.split("== train.toml\n")[1].split("\n== ")[0]
    commands = list(golden_commands(text))
    assert len(commands) == 3
    for command in commands:
        assert problems_of(command.argv, {"train.toml": train}) == []


# Every value of every group, for both tasks; no rule of the runner's own refuses it.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_every_choice_parses(task: str) -> None:
    for group, names in GROUPS.items():
        if group in ("experiment", "engine", "task"):
            continue
        for name in names:
            if (group, name) == ("model", "tiny"):
                continue
            extra = {
                ("optimizer", "custom"): ["optimizer.type=torch.optim.RMSprop"],
                ("sampling", "prompts"): ["sampling.prompts=[a cat]", "sampling.image_path=/a.png"],
            }.get((group, name), [])
            config = compose(f"task={task}", f"{group}={name}", *extra)
            assert conftest.problems_of(config) == [], (group, name)
            assert check_plan(plan_of(config, fake_facts(config, MEDIA, gpu=GPU))) == 3


# Every recipe with every optimizer, which no rule of the runner's own refuses; a recipe for
# pictures alone has no i2v, and its plan says so.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_every_recipe_parses_with_every_optimizer(task: str) -> None:
    checked = 0
    for recipe, optimizer in product(GROUPS["experiment"], GROUPS["optimizer"]):
        extra = ["optimizer.type=torch.optim.RMSprop"] if optimizer == "custom" else []
        config = compose(f"task={task}", f"experiment={recipe}", f"optimizer={optimizer}", *extra)
        assert conftest.problems_of(config) == [], (recipe, optimizer)
        if task == "i2v" and recipe in PICTURES_ALONE:
            with pytest.raises(UserError, match="learn to copy its first frame"):
                plan_of(config, fake_facts(config, MEDIA, gpu=GPU))
        elif config.engine.name == "musubi":
            checked += check_plan(plan_of(config, fake_facts(config, MEDIA, gpu=GPU)))
    assert checked >= 3 * 5 * len(GROUPS["optimizer"])


# Every option that the runner can write has the runner's own option beside it, and nothing else
# is kept from engine.extra_args.
def test_owned_options_are_those_the_runner_writes() -> None:
    written: set[str] = {"config_file", "resume", "resume_from_huggingface"}
    paths = WeightPaths(*"abcde")
    variants = [
        *[f"scheduler={name}" for name in SCHEDULERS],
        *[f"training.attention={name}" for name in ("sdpa", "flash", "xformers")],
        *[f"precision={name}" for name in GROUPS["precision"]],
        "task=i2v",
        "training.max_steps=3",
        "training.timestep_sampling=logsnr",
        "training.weighting_scheme=mode",
    ]
    everything = [
        "memory=12gb",
        "memory.checkpointing=offload",
        "memory.pinned=true",
        "memory.h2d_only=true",
        "training.min_timestep=1",
        "training.max_timestep=9",
        "training.preserve_distribution_shape=true",
        "training.num_timestep_buckets=4",
        "training.keep_last=1",
        "training.save_every_steps=5",
        "training.save_state=true",
        "training.resume_from=state",
        "network.weights=lora.safetensors",
        "metadata.author=a",
        "metadata.description=d",
        "metadata.license=l",
        "metadata.tags=[one,two]",
        "metadata.comment=c",
        "network.dropout=0.1",
        "+network.args.rank_dropout=0.1",
        "+optimizer.args.eps=1e-8",
        "scheduler.warmup_steps=1",
        "scheduler.min_lr_ratio=0.1",
        "scheduler.timescale=9",
        "sampling=prompts",
        "sampling.prompts=[a]",
        "sampling.at_first=true",
    ]
    for variant in variants:
        config = compose(variant, *everything)
        written |= set(
            train_options(
                Rendering(
                    config=config,
                    weights=paths,
                    memory=config.memory,
                    name="x",
                    resolution=(64, 48),
                    seed=1,
                    compile_blocks=True,
                )
            )
        )
    # A default that engine.extra_args may change: the command line goes over train.toml.
    assert written - {"compile_cache_size_limit"} == set(OWNED)
    assert set(OWNED) | set(REFUSED) <= set(options(TRAIN))


# What the trainer would misread in its file ends the plan in a line, whoever rendered it.
def test_a_wrong_train_toml_is_refused() -> None:
    config = compose()
    job = fake_facts(config, MEDIA, gpu=GPU).job
    with pytest.raises(UserError, match=r"^train\.toml: seed='7' must be a whole number\.$"):
        MusubiEngine().train(job, {"seed": "7"})
