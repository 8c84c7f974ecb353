"""Composition: every choice of every group, the rules between options, and what errors say."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import compose, problems_of, run_program
from in_process import program_here

from runner.config.dataset_schema import DatasetConfig
from runner.config.groups import conf_folder, groups
from runner.config.schema import RunConfig, options

CHOICES = [
    f"{group}={name}"
    for group, names in groups(conf_folder()).items()
    for name in names
    if group != "experiment"
]
RECIPES = groups(conf_folder())["experiment"]
OPTIMIZERS = groups(conf_folder())["optimizer"]


# Every choice of every group composes into a typed config.
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    extra = ["optimizer.type=torch.optim.RMSprop"] if choice == "optimizer=custom" else []
    assert isinstance(compose(choice, *extra), RunConfig)


# A group's file says by which name it was chosen, which is what MLflow shows.
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_knows_its_name(choice: str) -> None:
    group, name = choice.split("=")
    text = (conf_folder() / group / f"{name}.yaml").read_text()
    key = "kind" if group == "dataset" else "name"
    assert f"{key}: {name}\n" in text


# Every recipe composes with every optimizer, and none sets a learning rate: the rate belongs to
# the optimizer, or changing the optimizer would keep the other one's rate.
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_leave_the_learning_rate_to_the_optimizer(recipe: str) -> None:
    for optimizer in OPTIMIZERS:
        extra = ["optimizer.type=torch.optim.RMSprop"] if optimizer == "custom" else []
        alone = compose(f"optimizer={optimizer}", *extra).optimizer
        assert compose(f"experiment={recipe}", f"optimizer={optimizer}", *extra).optimizer == alone


# A group on the command line beats the recipe's choice, and so does a value.
def test_command_line_beats_recipe() -> None:
    config = compose("experiment=rehearsal", "optimizer=adafactor", "network.rank=7", "task=i2v")
    assert config.optimizer.name == "adafactor"
    assert (config.network.rank, config.network.alpha) == (7, 7)
    assert config.task.name == "i2v"
    assert config.engine.name == "diffusers"


# Alpha follows the rank unless it is set, or a rank sweep would compare different scales.
def test_alpha_follows_rank() -> None:
    assert compose("network.rank=8").network.alpha == 8
    assert compose("network.rank=8", "network.alpha=4").network.alpha == 4


# Every shipped recipe obeys the rules, for both tasks.
@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_obey_the_rules(recipe: str, task: str) -> None:
    assert problems_of(compose(f"experiment={recipe}", f"task={task}")) == []


# Every option has a meaning written down, except those of a source, which are the dataset's.
def test_every_option_has_help() -> None:
    assert [option.key for option in options() if not option.help] == []


# Sources are typed: an entry takes what it leaves out from the dataset.
def test_sources_are_typed_and_inherit() -> None:
    from runner.data.source_options import source_options

    config = compose(
        "dataset.sources=[{path: a.zip, num_repeats: 2}, {path: b, resolution: [64, 64]}]",
        "dataset.batch_size=3",
    )
    first, second = source_options(config.dataset)
    assert (first.path, first.num_repeats, first.batch_size) == ("a.zip", 2, 3)
    assert (second.resolution, second.num_repeats) == ((64, 64), 1)


BROKEN = {
    "name=../x": "name='../x' can't be a folder's name: leave out / and \\.",
    "network.include=['[']": (
        "network.include: '[' is not a regular expression: "
        "unterminated character set at position 0."
    ),
    "engine.extra_args=[--huggingface_token,hf_x]": (
        "engine.extra_args holds --huggingface_token: a secret on a command line can be read by "
        "others. Set it in the environment, for example HF_TOKEN."
    ),
    "network.rank=0": "network.rank=0 is too small: it must be at least 1.",
    "dataset.target_frames=[1,14]": (
        "dataset.target_frames: 14 is not of the form 4N+1 (nearest: 13 or 17)."
    ),
    "dataset.resolution=[100,64]": (
        "dataset.resolution=[100, 64]: 100 is not a multiple of 16 (nearest: 96)."
    ),
    "training.attention=sdap": "training.attention=sdap is not a choice. Did you mean sdpa?",
    "stages.skip=[dataset,train]": (
        "stages.skip=[dataset] would leave the later stages without media: leave it out, finished "
        "work is recognised."
    ),
    "stages.skip=[wieghts]": "stages.skip: there is no stage wieghts. Did you mean weights?",
    "model=tiny": (
        "model=tiny has random weights and is for the embedded engine: add engine=diffusers, or "
        "take model=hunyuan15_720p."
    ),
    "memory.blocks_to_swap=52": (
        "memory.blocks_to_swap=52 is too many: the network has 54 blocks and at most 51 can be "
        "swapped."
    ),
    "precision.fp8_scaled=true": "precision.fp8_scaled=true needs precision.fp8_base=true.",
    "sampling=prompts": "sampling=prompts needs sampling.prompts, for example [a cat on a roof].",
    "training.max_grad_norm=nan": "training.max_grad_norm=nan must be a number, at least 0.",
    "training.max_grad_norm=inf": "training.max_grad_norm=inf must be a number, at least 0.",
    "scheduler.power=nan": "scheduler.power=nan must be a number, at least 0.",
    "scheduler.power=-1": "scheduler.power=-1.0 is too small: it must be at least 0.",
    "sampling.seed=-1": "sampling.seed=-1 is too small: it must be at least 0.",
    "sampling.seed=18446744073709551616": (
        "sampling.seed=18446744073709551616 must be below 18446744073709551616."
    ),
    "dataset.validation_fraction=1": (
        "dataset.validation_fraction=1.0 must be at least 0 and below 1."
    ),
}


# Each broken rule is reported in one line that says what is wrong and what would be right.
@pytest.mark.parametrize("override", BROKEN)
def test_rules_say_what_is_wrong(override: str) -> None:
    assert next(iter(problems_of(compose(override)))) == BROKEN[override]


# A limit itself is allowed where the rule says "at least" or "at most".
def test_limits_are_allowed() -> None:
    at_limit = (
        *("network.rank=1", "network.dropout=0", "training.epochs=1", "training.keep_last=1"),
        *("training.max_grad_norm=0", "training.min_timestep=0", "training.max_timestep=1000"),
        *("scheduler=polynomial", "scheduler.power=0", "scheduler.warmup_steps=0"),
        *("sampling.seed=18446744073709551615", "dataset.validation_fraction=0"),
        *("dataset.batch_size=1", "dataset.num_repeats=1", "memory.text_batch_size=1"),
    )
    assert list(problems_of(compose(*at_limit))) == []


# What a source may have of its own, and is at least 1.
COUNTS = [option.key for option in options(DatasetConfig) if option.bounds.at_least == 1]
SOURCE = {
    **{
        f"{key}: {value}": f"{key}={value} is too small: it must be at least 1."
        for key in COUNTS
        for value in (0, -1)
    },
    **{
        f"source_fps: {value}": f"source_fps={value} must be a number above 0."
        for value in ("0.0", "-1.0", "nan", "inf")
    },
    "frame_extraction: haed": "frame_extraction=haed is not a choice. Did you mean head?",
    "kind: fodler": "kind=fodler is not a choice. Did you mean folder?",
}


# What a source has of its own is held to the rules of the dataset's options.
@pytest.mark.parametrize("own", SOURCE)
def test_a_source_is_held_to_the_same_rules(own: str) -> None:
    config = compose(f"dataset.sources=[{{path: a, num_repeats: 2}}, {{path: b, {own}}}]")
    assert list(problems_of(config)) == [f"dataset.sources[1].{SOURCE[own]}"]


SAID = {
    ("optimiser=adamw",): "There is no option optimiser. Did you mean optimizer=adamw?",
    ("optimizer=adamv",): "There is no optimizer=adamv. Did you mean adamw?",
    ("network.rnk=3",): "There is no option network.rnk. Did you mean network.rank?",
    ("rank=3",): "There is no option rank. Did you mean network.rank?",
    ("learning_rate=3",): (
        "There is no option learning_rate. Did you mean optimizer.learning_rate?"
    ),
    ("network.rank=three",): "network.rank=three must be a whole number.",
    ("dry_run=maybe",): "dry_run=maybe must be true or false.",
    ("experiment=reharsal",): "There is no experiment=reharsal. Did you mean rehearsal?",
    ("network=5",): "There is no network=5. There are: loha, lokr, lora.",
    ("-m", "optimizer=adamw,adafacto"): ("There is no optimizer=adafacto. Did you mean adafactor?"),
    ("dataset.sources=[{path: a, repeats: 2}]",): (
        "dataset.sources: there is no option repeats. Did you mean num_repeats?"
    ),
    ("optimizer=custom",): (
        "optimizer.type has no value: set it, for example optimizer.type=torch.optim.RMSprop."
    ),
    ("dataset.resolution=5",): (
        "dataset.resolution is a list, in brackets: runner 'dataset.resolution=[5,5]'"
    ),
    ("tracking.uri=[a b",): (
        "'tracking.uri=[a b' can't be read: no viable alternative at input '[a b'. Quote values "
        "with spaces or brackets twice, for example 'sampling.prompts=[\"a, b\"]'."
    ),
    ("model.revision=null",): "model.revision can't be null.",
    ("model.revision=null", "--cfg", "job"): "model.revision can't be null.",
    ("metadata.title=???",): "metadata.title has no value: set it.",
    ("rehearsal",): "'rehearsal' is not an option: write KEY=VALUE.",
    ("+network.rnk=2",): "There is no option network.rnk. Did you mean network.rank?",
    ("++zzz=1",): "There is no option zzz. `python -m runner --cfg job` lists them all.",
    ("--hlep",): "There is no flag --hlep. Did you mean --help?",
    ("hydra/launcher=basic", "network.rank=abc"): "network.rank=abc must be a whole number.",
}


# A wrong option or value ends with exit code 2 and one line that names the nearest right one.
@pytest.mark.parametrize("arguments", SAID, ids=" ".join)
def test_wrong_arguments_name_the_nearest(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = program_here(*arguments, cwd=tmp_path)
    assert (done.code, done.err) == (2, f"error: {SAID[arguments]}\n")
    assert list(tmp_path.iterdir()) == []


# The same as a person meets it: the process ends with that code, with no word more on its streams.
@pytest.mark.parametrize("arguments", [("optimiser=adamw",), ("network.rank=three",)], ids=" ".join)
def test_a_wrong_argument_ends_the_process(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run_program(*arguments, cwd=tmp_path)
    assert (done.code, done.out, done.err) == (2, "", f"error: {SAID[arguments]}\n")
