"""The plan: golden files for what each engine is given, and what decides that work is done."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of, report_of
from hostile_texts import texts
from plan_text import difference, rendered

from runner.cli.page import page
from runner.config.groups import conf_folder, groups
from runner.core.errors import UserError
from runner.data.select import dataset_fingerprint
from runner.engines.base import NO_GPU, Gpu
from runner.formats.train_options import TABLE
from runner.pipeline.model import Plan
from runner.pipeline.plan import commands_sh

MEDIA = [fake_item("a.jpg"), fake_item("b.png", size=(600, 800)), fake_item("clip.mp4")]
GPU = Gpu("NVIDIA H100", 80.0, (9, 0))


BASES = {
    "diffusers": ["engine=diffusers", "model=tiny", "optimizer=adamw", "precision=fp32"],
    "musubi": [],
}
VARIANTS = [f"{group}={name}" for group, names in groups(conf_folder()).items() for name in names]
# What a choice can't be planned without.
NEEDED = {
    "model=tiny": BASES["diffusers"],
    "engine=diffusers": BASES["diffusers"],
    "optimizer=custom": ["optimizer.type=torch.optim.RMSprop"],
    "sampling=prompts": ["sampling.prompts=[a cat]"],
}


def planned(*overrides: str) -> Plan:
    config = compose(*overrides)
    return plan_of(config, fake_facts(config, MEDIA, gpu=GPU))


WHOLE = ["memory=24gb"]


# What an engine is given for a mixed dataset is what the golden file shows, whole.
def test_whole_plan_is_golden(golden: Callable[[str, str], None]) -> None:
    golden("musubi-t2v.txt", rendered(planned(*WHOLE)))


# A text of any characters is one argument of the trainer in the shell that repeats the run, and a
# comment there stays one.
def test_texts_in_commands() -> None:
    for text in [*texts(60)[30:], "new\nline"]:
        overrides = [f"{key}={text}" for key in ("name", "metadata.author", "metadata.comment")]
        plan = planned("engine.arguments=command_line", *overrides)
        script = commands_sh(plan)
        words = shlex.split(script, comments=True)
        assert words[:2] == ["set", "-e"]
        for option in ("--metadata_title", "--metadata_author", "--training_comment"):
            [value] = [
                words[n + 1] if word == option else word.removeprefix(f"{option}=")
                for n, word in enumerate(words)
                if word.partition("=")[0] == option
            ]
            assert value == text


# Further plans, and what each is compared with.
OTHERS = {
    "musubi-i2v": ([*WHOLE, "task=i2v"], WHOLE),
    "diffusers-t2v": ([*BASES["diffusers"], "memory=cpu"], BASES["diffusers"]),
    "diffusers-i2v": ([*BASES["diffusers"], "memory=cpu", "task=i2v"], BASES["diffusers"]),
}


# The other task and the other engine are given what the golden files show otherwise.
@pytest.mark.parametrize("name", OTHERS)
def test_other_plans_are_golden(name: str, golden: Callable[[str, str], None]) -> None:
    overrides, base = OTHERS[name]
    golden(f"{name}.diff", difference(planned(*base), planned(*overrides)))


# With source_fps the trainer reads as far as its longest target says, so none may be left out
# of what it is reported, though only some crops are missing.
def test_targets_are_whole_when_frames_are_resampled() -> None:
    config = compose(*BASES["diffusers"], "dataset.source_fps=12")
    facts = fake_facts(config, [fake_item("clip.mp4")])
    plan = plan_of(config, facts)
    crops = [entry.cache_inputs["frames"] for entry in plan.stage("latents").entries]
    assert crops == [[0, 1], [0, 13]]
    one = frozenset({f"latents/{plan.stage('latents').entries[0].key}"})
    again = plan_of(config, fake_facts(config, [fake_item("clip.mp4")], cached=one))
    toml = dict(again.stage("latents").files)["staging/latents.toml"]
    assert toml == dict(plan.stage("latents").files)["staging/latents.toml"]
    assert "25" in toml


# Items whose folders' names give repeats have tables of their own, in which those of the source are
# multiplied; the steps of an epoch count them, and so does the fingerprint of the dataset.
def test_repeats_of_folders_are_planned() -> None:
    import tomllib

    config = compose(*BASES["diffusers"], "dataset.num_repeats=2", "dataset.batch_size=1")
    items = [fake_item("10_a/p.jpg"), fake_item("3_b/p.jpg"), fake_item("1_c/p.jpg")]
    plain = plan_of(config, fake_facts(config, items))
    repeated = [replace(item, repeats=int(item.name.split("_")[0])) for item in items]
    facts = fake_facts(config, repeated)
    plan = plan_of(config, facts)
    tables = tomllib.loads(dict(plan.files)["dataset.toml"])["datasets"]
    assert [(t["cache_directory"], t["num_repeats"]) for t in tables] == [
        ("cache/0-images", 2),
        ("cache/0-images-x3", 6),
        ("cache/0-images-x10", 20),
    ]
    written = dict(plan.stage("dataset").files)
    assert [written[table["image_jsonl_file"]].count("\n") for table in tables] == [1, 1, 1]
    linked = {place for entry in plan.entries for place in entry.links}
    assert all(
        any(place.startswith(t["cache_directory"] + "/") for place in linked) for t in tables
    )
    assert (plain.steps_per_epoch, plan.steps_per_epoch) == (6, 28)
    plain_items = fake_facts(config, items).selection.items
    assert dataset_fingerprint(facts.selection.items) != dataset_fingerprint(plain_items)
    # A regularisation set is seen as often as its weight says.
    config = compose(
        *BASES["diffusers"], "dataset.sources=[{path: a}, {path: r, regularisation: true}]"
    )
    selected = fake_facts(config, repeated).selection.items
    assert {item.repeats for item in selected if item.source == 1} == {1}


# Several datasets in one run keep their own resolution, repeats and frames, in what the trainer is
# given, in what is encoded, and in the count of steps.
def test_several_datasets_in_one_run() -> None:
    import tomllib

    config = compose(
        *BASES["diffusers"],
        "dataset.sources=[{path: a.zip, num_repeats: 2, resolution: [64, 64]},"
        "{path: b, resolution: [96, 64], target_frames: [5]}]",
        "dataset.batch_size=1",
    )
    facts = fake_facts(config, [fake_item("p.jpg", size=(64, 64)), fake_item("c.mp4", frames=9)])
    plan = plan_of(config, facts)
    tables = tomllib.loads(dict(plan.files)["dataset.toml"])["datasets"]
    assert [(t["resolution"], t["num_repeats"], t.get("target_frames")) for t in tables] == [
        ([64, 64], 2, None),
        ([64, 64], 2, [1]),
        ([96, 64], 1, None),
        ([96, 64], 1, [5]),
    ]
    assert len({t["cache_directory"] for t in tables}) == 4
    assert plan.steps_per_epoch == 2 * 2 + 2
    buckets = {tuple(e.cache_inputs["bucket"]) for e in plan.stage("latents").entries}
    assert len(buckets) > 1


# musubi-tuner caches clips in buckets whatever its options say, and needs the same in training.
def test_clips_are_always_in_buckets() -> None:
    import tomllib

    config = compose("dataset.enable_bucket=false", "dataset.bucket_no_upscale=true")
    plan = plan_of(config, fake_facts(config, MEDIA, gpu=GPU))
    pictures, clips = tomllib.loads(dict(plan.files)["dataset.toml"])["datasets"]
    assert (pictures["enable_bucket"], pictures["bucket_no_upscale"]) == (False, True)
    assert (clips["enable_bucket"], clips["bucket_no_upscale"]) == (True, False)


# Without training there is nothing to convert or evaluate, and the script runs what is to run.
def test_skipping_training_skips_what_needs_its_lora() -> None:
    config = compose(*BASES["diffusers"], "stages.skip=[train]")
    plan = plan_of(config, fake_facts(config, MEDIA))
    states = {stage.name: stage.state for stage in plan.stages}
    assert states["train"] == states["convert"] == states["evaluate"] == "skipped"
    assert "engines.diffusers.train" not in commands_sh(plan)


# An 8-bit optimizer is refused before any work where there is no GPU for it.
def test_8_bit_needs_a_card() -> None:
    config = compose(*BASES["diffusers"], "optimizer=lion8bit")
    with pytest.raises(UserError, match="optimizer=lion8bit needs an NVIDIA GPU"):
        plan_of(config, fake_facts(config, MEDIA))


def set_by(recipe: str) -> set[str]:
    """The options of train.toml that a recipe itself sets."""
    from omegaconf import OmegaConf

    values = OmegaConf.load(conf_folder() / "experiment" / f"{recipe}.yaml")
    return {
        name
        for name, option in TABLE.items()
        if OmegaConf.select(values, str(option.set_by)) is not None
    }


# Each choice of each group changes what its engine is given by default as its golden file shows; an
# engine's default is shown by what it has otherwise than the whole plan. What a recipe sets is
# shown also where it is the default, which may change.
@pytest.mark.parametrize("choice", VARIANTS)
def test_every_choice_is_golden(choice: str, golden: Callable[[str, str], None]) -> None:
    plan = planned(*NEEDED.get(choice, []), choice)
    engine = "musubi" if "corrected.py" in dict(plan.files) else "diffusers"
    base = WHOLE if choice.startswith("engine=") else BASES[engine]
    group, _, name = choice.partition("=")
    shown = set_by(name) if group == "experiment" else ()
    golden(f"choices/{choice}.diff", difference(planned(*base), plan, shown))


# The very plans that choices are compared with are those that the engines' choices show.
def test_defaults_are_the_engines_choices() -> None:
    for engine, base in BASES.items():
        assert rendered(planned(*base)) == rendered(planned(*base, f"engine={engine}"))


# The dry run is a page a person reads; its text is kept whole.
def test_page_is_golden(golden: Callable[[str, str], None]) -> None:
    config = compose(*BASES["diffusers"], "dry_run=true", "dataset.validation_fraction=0.3")
    facts = fake_facts(config, MEDIA)
    golden("page.txt", page(plan_of(config, facts), facts, report_of(config, facts)))


def keys(plan: Plan, stage: str) -> set[str]:
    return {f"{entry.namespace}/{entry.key}" for entry in plan.stage(stage).entries}


def missing_after(changes: list[str], items: list[Any] | None = None) -> tuple[int, int]:
    """Latents and captions left to encode, after everything was encoded and then changed."""
    base = BASES["diffusers"]
    config = compose(*base)
    plan = plan_of(config, fake_facts(config, MEDIA))
    cached = frozenset(keys(plan, "latents") | keys(plan, "text"))
    config = compose(*base, *changes)
    plan = plan_of(config, fake_facts(config, items or MEDIA, cached=cached))
    return plan.stage("latents").missing, plan.stage("text").missing


# Nothing is encoded twice, and nothing stale is used: a change makes just its own entries missing.
def test_only_what_changed_is_missing() -> None:
    recaptioned = [replace(MEDIA[0], caption="other"), *MEDIA[1:]]
    renamed = [replace(item, name=f"renamed/{item.name}") for item in MEDIA]
    added = [*MEDIA, fake_item("c.jpg")]
    repainted = [replace(MEDIA[0], sha256="0" * 64), *MEDIA[1:]]
    assert missing_after([]) == (0, 0)
    assert missing_after(["network.rank=8"]) == (0, 0)
    assert missing_after(["optimizer=adafactor", "training.epochs=3"]) == (0, 0)
    assert missing_after([], renamed) == (0, 0)
    assert missing_after([], recaptioned) == (0, 1)
    assert missing_after(["dataset.trigger_word=ohwx"]) == (0, 3)
    assert missing_after([], added) == (1, 1)
    assert missing_after([], repainted) == (1, 0)
    assert missing_after(["dataset.resolution=[320,544]"]) == (5, 0)
    assert missing_after(["dataset.target_frames=[1,13,25,29]"]) == (1, 0)
    assert missing_after(["dataset.source_fps=30"]) == (3, 0)
    assert missing_after(["task=i2v"]) == (2, 0)
    assert missing_after(["stages.force=[latents]"]) == (5, 0)


# Equal media with two captions are two items, which share one encoding of the media.
def test_equal_media_with_two_captions_both_survive() -> None:
    twin = replace(MEDIA[0], name="twin.jpg", caption="another caption")
    config = compose(*BASES["diffusers"])
    plan = plan_of(config, fake_facts(config, [MEDIA[0], twin]))
    (entry,) = plan.stage("latents").entries
    assert len(entry.links) == 2
    assert plan.stage("text").missing == 2
    assert plan.steps_per_epoch == 2


# An untouched plan is equal to itself: nothing in it depends on time or on an order by chance.
def test_plan_is_pure() -> None:
    config = compose(*BASES["diffusers"])
    facts = fake_facts(config, MEDIA)
    shuffled = fake_facts(config, list(reversed(MEDIA)))
    assert plan_of(config, facts) == plan_of(config, facts)
    assert rendered(plan_of(config, facts)) == rendered(plan_of(config, shuffled))


# Steps are counted as the trainer will: batches of equal shape, repeats, accumulation.
def test_steps_are_counted_by_bucket() -> None:
    base = BASES["diffusers"]

    def steps(*overrides: str) -> tuple[int, int]:
        config = compose(*base, *overrides)
        plan = plan_of(config, fake_facts(config, MEDIA))
        return plan.steps_per_epoch, plan.steps

    assert steps("training.epochs=2") == (5, 10)
    assert steps("training.epochs=2", "dataset.num_repeats=3") == (15, 30)
    assert steps("training.epochs=2", "dataset.num_repeats=3", "dataset.batch_size=2") == (10, 20)
    assert steps("training.epochs=2", "training.gradient_accumulation_steps=2") == (3, 6)
    assert steps("training.max_steps=7") == (5, 7)


# What would let a GPU compile is said to that GPU only: fp8, and room for it without block swap.
def test_a_card_that_need_not_swap_is_reported() -> None:
    def hint(name: str, memory_gb: float, capability: tuple[int, int], *overrides: str) -> str:
        gpu = Gpu(name, memory_gb, capability)
        config = compose("memory=24gb", *overrides)
        notices = plan_of(config, fake_facts(config, MEDIA, gpu=gpu)).notices
        return next(notice for notice in notices if "torch.compile" in notice)

    swap = "torch.compile is off: it gained nothing with block swap (memory.blocks_to_swap)"
    better = "; in fp8 25 frames fit without: memory.blocks_to_swap=0 would compile."
    assert hint("RTX 4090", 24.0, (8, 9), "precision=fp8") == swap + better
    assert hint("RTX 4090", 24.0, (8, 9)) == swap + "."
    assert hint("RTX 4080", 16.0, (8, 9), "precision=fp8") == swap + "."
    assert "it cannot compile fp8" in hint("RTX 3090", 24.0, (8, 6), "precision=fp8")


# torch.compile is on where it works, and the page says why where it does not.
def test_compile_follows_the_card() -> None:
    ampere = Gpu("NVIDIA RTX 3090", 24.0, (8, 6))

    def compiled(gpu: Gpu | None, *overrides: str) -> tuple[bool, bool]:
        config = compose("memory=80gb", *overrides)
        plan = plan_of(config, fake_facts(config, MEDIA, gpu=gpu))
        on = "compile = true" in dict(plan.files)["train.toml"]
        return on, any("torch.compile" in notice for notice in plan.notices)

    assert compiled(GPU) == (True, False)
    assert compiled(ampere) == (True, False)
    assert compiled(ampere, "precision=fp8") == (False, True)
    turing, pascal = Gpu("RTX 8000", 48.0, (7, 5)), Gpu("P40", 24.0, (6, 1))
    assert compiled(turing) == compiled(pascal, "precision=fp16") == (False, True)
    assert compiled(turing, "precision=fp16") == (True, False)
    assert compiled(GPU, "training.compile=none") == (False, False)
    assert compiled(GPU, "memory.blocks_to_swap=1") == (False, True)
    assert compiled(GPU, "memory.blocks_to_swap=1", "training.compile=always") == (True, False)
    assert compiled(None) == (False, True)
    swap = ("memory.blocks_to_swap=1", "precision=fp8")
    assert compiled(GPU, *swap) == compiled(ampere, *swap) == (False, True)
    with pytest.raises(UserError, match=r"always: below compute capability 8.9 \(NVIDIA RTX 3090"):
        compiled(ampere, "precision=fp8", "training.compile=always")
    assert compiled(ampere, "training.compile=always") == (True, False)
    assert compiled(None, "training.compile=always") == (True, False)


# A GPU of just the capability that Triton, bf16 or fp8 needs compiles: V100, A100 and L40.
def test_compile_begins_at_the_capability_itself() -> None:
    def compiled(name: str, capability: tuple[int, int], precision: str) -> bool:
        config = compose("memory=80gb", f"precision={precision}")
        gpu = Gpu(name, 80.0, capability)
        files = dict(plan_of(config, fake_facts(config, MEDIA, gpu=gpu)).files)
        return "compile = true" in files["train.toml"]

    assert compiled("V100", (7, 0), "fp16")
    assert not compiled("P100", (6, 9), "fp16")
    assert compiled("A100", (8, 0), "bf16")
    assert not compiled("V100", (7, 9), "bf16")
    assert compiled("L40", (8, 9), "fp8")
    assert not compiled("A40", (8, 8), "fp8")


# An engine that can't compile is used without, with its reason on the page.
def test_compile_follows_the_engine() -> None:
    config = compose("memory=80gb")
    facts = fake_facts(config, MEDIA, gpu=GPU)
    engine = replace(facts.engine, cannot_compile="there is no C compiler")
    plan = plan_of(config, replace(facts, engine=engine))
    assert "torch.compile is off: there is no C compiler." in plan.notices
    assert "compile" not in dict(plan.files)["train.toml"]


# memory=auto takes the largest tier the GPU holds, and what is set by hand stays.
def test_memory_tier_follows_the_card() -> None:
    from runner.engines.registry import engine_named

    def tier(gigabytes: float, *overrides: str) -> tuple[str, int | None]:
        gpu = Gpu("a GPU", gigabytes, (8, 9))
        config = compose(*overrides)
        memory, _ = engine_named(config.engine.name).memory_plan(config, gpu, NO_GPU)
        return memory.name, memory.blocks_to_swap

    assert tier(11.7)[0] == "12gb"
    assert tier(15.6)[0] == "16gb"
    assert tier(23.5)[0] == "24gb"
    assert tier(79.1) == ("80gb", 0)
    assert tier(23.5, "memory.blocks_to_swap=3") == ("24gb", 3)
    assert tier(79.1, "memory=16gb")[0] == "16gb"


# Tiles approximate the whole frame: latents made without them serve a run that asks for tiles, and
# not the other way round; a run that forces the stage gets what it asks for.
def test_untiled_latents_serve_any_tile() -> None:
    def latents(tile: int, cached: frozenset[str] = frozenset(), *more: str) -> Any:
        config = compose("memory=24gb", f"memory.vae_tile={tile}", *more)
        return plan_of(config, fake_facts(config, MEDIA, gpu=GPU, cached=cached))

    whole, tiled = (frozenset(keys(latents(tile), "latents")) for tile in (0, 128))
    assert not whole & tiled
    assert latents(128, whole).stage("latents").missing == 0
    assert keys(latents(128, whole), "latents") == whole
    assert latents(0, tiled).stage("latents").missing == len(whole)
    assert keys(latents(128, whole, "stages.force=[latents]"), "latents") == tiled
