"""The embedded engine's own rules: what its executables refuse is reported before work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of, problems_of
from in_process import program_here
from other_processes import pictures

from runner.core.errors import UserError
from runner.engines.base import Gpu
from runner.engines.diffusers import try_optimizer
from runner.engines.diffusers.engine import DiffusersEngine

EMBEDDED = ("engine=diffusers", "model=tiny", "optimizer=adamw")
SMALL = Gpu("small GPU", 12.0, (8, 9))


def plan(*overrides: str, gpu: Gpu | None = SMALL) -> Any:
    config = compose(*EMBEDDED, *overrides)
    return plan_of(config, fake_facts(config, [fake_item("a.jpg")], gpu=gpu))


BROKEN: dict[tuple[str, ...], str] = {
    ("model=hunyuan15_480p", "model.blocks=40"): (
        "model.blocks=40 can't be: model=hunyuan15_480p has 54."
    ),
    ("model.blocks=3",): "model.blocks=3 can't be: model=tiny has 2.",
    ("+network.args.verbose=true",): (
        "network=lora has no argument verbose. There are: loraplus_lr_ratio, module_dropout, "
        "rank_dropout."
    ),
    ("network=loha", "+network.args.factor=4"): (
        "network=loha has no argument factor. There are: module_dropout, rank_dropout."
    ),
    ("precision=fp8",): (
        "precision=fp8 needs engine=musubi; engine=diffusers takes bf16, fp16 or fp32."
    ),
    ("precision=fp32", "precision.dit_dtype=bfloat16"): (
        "precision.mixed_precision=no needs precision.dit_dtype=float32: take precision=fp32."
    ),
    ("memory=24gb", "memory.blocks_to_swap=12"): (
        "memory.blocks_to_swap=12 needs engine=musubi; engine=diffusers chooses the blocks that "
        "wait in main memory itself, from memory.limit_gb."
    ),
    ("memory.checkpointing=offload",): (
        "memory.checkpointing=offload needs engine=musubi; engine=diffusers takes none or full."
    ),
    ("training.attention=flash",): (
        "training.attention=flash needs engine=musubi; engine=diffusers takes sdpa."
    ),
    ("training.attention=xformers",): (
        "training.attention=xformers needs engine=musubi; engine=diffusers takes sdpa."
    ),
    ("training.save_state=true",): (
        "training.save_state and training.resume_from need engine=musubi."
    ),
    ("training.resume_from=a",): "training.save_state and training.resume_from need engine=musubi.",
    ("training.timestep_sampling=sigma",): (
        "training.timestep_sampling=sigma needs engine=musubi; engine=diffusers takes shift, "
        "sigmoid, uniform or logsnr."
    ),
    ("training.num_timestep_buckets=4",): (
        "training.num_timestep_buckets=4 needs engine=musubi; engine=diffusers draws timesteps "
        "independently of each other."
    ),
    ("training.weighting_scheme=cosmap",): (
        "training.weighting_scheme=cosmap needs engine=musubi; engine=diffusers takes none."
    ),
    ("engine.arguments=command_line",): "engine.arguments=command_line needs engine=musubi.",
    ("engine.cache_args=[--num_workers,2]",): (
        "engine.cache_args are arguments of musubi-tuner's scripts: they need engine=musubi."
    ),
    ("training.split_attention=true",): (
        "training.split_attention needs engine=musubi; engine=diffusers leaves padding out of "
        "attention by itself."
    ),
    ("engine.extra_args=[--save_state]",): (
        "engine.extra_args are arguments of musubi-tuner: they need engine=musubi."
    ),
}


# Each broken rule is reported in one line that says what is wrong and what would be right.
@pytest.mark.parametrize("overrides", BROKEN, ids=" ".join)
def test_rules_say_what_is_wrong(overrides: tuple[str, ...]) -> None:
    assert problems_of(compose(*EMBEDDED, *overrides)) == [BROKEN[overrides]]


# What it takes and musubi-tuner does not passes.
@pytest.mark.parametrize(
    "overrides",
    [
        ("precision.mixed_precision=no",),
        ("precision=fp16",),
        ("training.compile=none",),
        ("training.compile=always",),
        ("training.seed=4294967296",),
        ("network.exclude=['.*(?=attn).*']",),
        ("model=hunyuan15_480p",),
        ("optimizer=custom", "optimizer.type=PagedLion8bit"),
        ("optimizer=custom", "optimizer.type=transformers.optimization.Adafactor"),
        ("sampling=prompts", "sampling.prompts=['N scale railway']", "sampling.steps=1001"),
    ],
    ids=" ".join,
)
def test_what_is_right_passes(overrides: tuple[str, ...]) -> None:
    assert problems_of(compose(*EMBEDDED, *overrides)) == []


# Whatever of bitsandbytes is asked for, it needs a GPU.
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedLion8bit", "bitsandbytes.optim.PagedAdamW"])
def test_bitsandbytes_needs_a_gpu(name: str) -> None:
    with pytest.raises(UserError) as error:
        plan("optimizer=custom", f"optimizer.type={name}", gpu=None)
    assert str(error.value) == (
        "optimizer=custom needs an NVIDIA GPU, and none was found: take optimizer=adamw."
    )
    plan("optimizer=custom", f"optimizer.type={name}")


NEEDS_GPU = (
    "model=hunyuan15_720p needs an NVIDIA GPU, and none was found: take model=tiny for a rehearsal "
    "on the CPU."
)
TOO_SMALL = "model=hunyuan15_720p needs a GPU of {} GB with engine=diffusers{}, and {} has {} GB{}."
FETCH_ONLY = "stages.skip=[dataset,latents,text,train,convert,evaluate]"


# The published weights are computed with on any GPU of 8 GB or more, and fetched anywhere.
@pytest.mark.parametrize(
    ("gpu", "overrides", "refusal"),
    [
        (None, (), NEEDS_GPU),
        (None, (FETCH_ONLY,), None),
        (Gpu("1060", 6.0, (6, 1)), (), TOO_SMALL.format(8, "", "1060", 6, "")),
        (Gpu("3070", 7.99, (8, 6)), (), None),
        (
            Gpu("4090", 23.99, (8, 9)),
            ("precision.dit_dtype=float32",),
            TOO_SMALL.format(48, " and weights in fp32", "4090", 24, ": take precision=bf16"),
        ),
        (Gpu("A6000", 47.5, (8, 6)), ("precision=fp32",), None),
    ],
)
def test_published_weights_need_a_gpu(
    gpu: Gpu | None, overrides: tuple[str, ...], refusal: str | None
) -> None:
    arguments = ("model=hunyuan15_720p", *overrides)
    if refusal is None:
        plan(*arguments, gpu=gpu)
        return
    with pytest.raises(UserError) as error:
        plan(*arguments, gpu=gpu)
    assert str(error.value) == refusal


NOTICES_OF: dict[tuple[str, ...], str] = {
    ("memory.fp8_text_encoder=true",): (
        "memory.fp8_text_encoder=true does nothing with engine=diffusers: leave it out, or take "
        "engine=musubi."
    ),
    ("memory.pinned=true",): (
        "memory.pinned=true does nothing with engine=diffusers: leave it out, or take "
        "engine=musubi."
    ),
    ("memory.h2d_only=true",): (
        "memory.h2d_only=true does nothing with engine=diffusers: leave it out, or take "
        "engine=musubi."
    ),
    ("engine.path=a",): (
        "engine.path does nothing with engine=diffusers, which is the runner's own: leave it "
        "out, or take engine=musubi."
    ),
    ("engine.python=a",): (
        "engine.python does nothing with engine=diffusers, which is the runner's own: leave it "
        "out, or take engine=musubi."
    ),
    ("training.data_workers=4",): (
        "training.data_workers=4 does nothing with engine=diffusers, which reads ahead in one "
        "thread: leave it out."
    ),
    ("model.transformer=mine.safetensors",): (
        "model.transformer does nothing with model=tiny, whose weights are made at random: leave "
        "it out, or take model=hunyuan15_720p."
    ),
    ("model.revision=v1",): (
        "model.revision does nothing with model=tiny, whose weights are made at random: leave "
        "it out, or take model=hunyuan15_720p."
    ),
}


# What does nothing is a notice of the plan.
@pytest.mark.parametrize("overrides", NOTICES_OF, ids=" ".join)
def test_what_does_nothing_is_reported(overrides: tuple[str, ...]) -> None:
    assert not [line for line in plan().notices if "nothing" in line]
    lines = plan(*overrides).notices
    assert [line for line in lines if "nothing" in line] == [NOTICES_OF[overrides]]


# Without a GPU the precision is what the CPU has, whatever was asked for.
def test_the_cpu_has_one_precision() -> None:
    line = "precision=bf16 does nothing without a GPU: on the CPU everything is computed in fp32."
    assert line in plan(gpu=None).notices
    assert line not in plan().notices
    assert not [lines for lines in plan("precision=fp32", gpu=None).notices if "CPU" in lines]


# What a tier of the GPU says for the real weights is not asked of this engine's trainer, which
# would refuse it once everything is cached.
def test_the_tier_of_a_small_gpu_swaps_no_blocks() -> None:
    toml = dict(plan("memory=auto").files)["train.toml"]
    assert "gradient_checkpointing = true" in toml
    for name in ("blocks_to_swap", "block_swap", "pinned", "fp8_vl"):
        assert name not in toml


REFUSED = {
    ("optimizer.type=no_such_library.Sum",): (
        "optimizer.type='no_such_library.Sum' cannot be imported: No module named "
        "'no_such_library' (install it with: "
    ),
    ("optimizer.type=torch.optim.AdamV",): (
        "optimizer.type='torch.optim.AdamV' cannot be imported: torch.optim has no class AdamV. "
        "Did you mean Adam?"
    ),
    ("optimizer.type=torch.optim.Adafactor", "+optimizer.args.relative_step=true"): (
        "optimizer.type='torch.optim.Adafactor' refused its options: "
    ),
}


# A class that no rule knows is tried out before any stage: what it lacks is said then, and not
# after everything is cached. Nothing is written.
@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_an_unknown_optimizer_is_tried_out(overrides: tuple[str, ...], tmp_path: Path) -> None:
    pictures(tmp_path / "media", 1)
    done = program_here(
        *("experiment=rehearsal", "optimizer=custom", "dataset=auto", "dataset.path=media"),
        *("tracking=none", *overrides),
        cwd=tmp_path,
    )
    assert done.code == 2, done.out
    assert done.err.startswith(f"error: engine=diffusers: {REFUSED[overrides]}")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "outputs" / "runs").exists()


# One that is right passes, and without a training none is tried.
def test_a_right_optimizer_passes() -> None:
    def check(*overrides: str, trains: bool = True) -> str:
        config = compose(*EMBEDDED, "optimizer=custom", *overrides)
        job = fake_facts(config, [fake_item("a.jpg")]).job
        engine = DiffusersEngine()
        job = replace(job, engine=engine.locate(config, Path("/")))
        return engine.check(job, None, trains=trains)

    version = check("optimizer.type=torch.optim.Adafactor", "+optimizer.args.d=2.0")
    assert version.startswith("runner ")
    assert check("optimizer.type=no.Such", trains=False) == version


# What fails in its first step is said by its name, whatever it raises.
def test_an_optimizer_that_takes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halting.py").write_text(
        "import torch\n"
        "class Halts(torch.optim.SGD):\n"
        "    def step(self):\n"
        "        raise LookupError('no ground')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        try_optimizer.main(["--optimizer_type", "halting.Halts", "--learning_rate", "1e-3"])
    assert str(error.value) == (
        "train.toml: optimizer_type='halting.Halts' failed in its first step: LookupError: no "
        "ground"
    )


# memory.limit_gb reaches every stage that loads a large network, and a tier's name is a limit.
@pytest.mark.parametrize(
    ("overrides", "limit", "noticed"),
    [
        ((), None, False),
        (("memory.limit_gb=8",), "8.0", False),
        (("memory=16gb",), "16.0", True),
        (("memory=16gb", "memory.limit_gb=10"), "10.0", False),
    ],
)
def test_memory_is_limited(overrides: tuple[str, ...], limit: str | None, noticed: bool) -> None:
    made = plan("model=hunyuan15_720p", *overrides, gpu=Gpu("4090", 23.99, (8, 9)))
    given = ["--memory_limit_gb", limit] if limit else []
    for name in ("text", "train", "evaluate"):
        argv = made.stage(name).commands[0].argv
        assert [a for a in argv if a in ("--memory_limit_gb", limit)] == given, name
    notice = (
        "memory=16gb is memory.limit_gb=16 with engine=diffusers, which chooses by itself how many "
        "blocks wait in main memory."
    )
    assert [line for line in made.notices if "memory" in line] == [notice] * noticed
