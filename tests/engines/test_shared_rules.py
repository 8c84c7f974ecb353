"""Rules that the engines share: each is reported in either engine, before anything is written."""

from __future__ import annotations

import pytest
from conftest import compose, fake_facts, fake_item, plan_of, problems_of

from runner.config.groups import conf_folder, groups
from runner.core.errors import UserError
from runner.engines.rules_optimizer import SCHEDULERS

ENGINES = {"musubi": (), "diffusers": ("engine=diffusers", "model=tiny")}
PROMPTS = ("sampling=prompts",)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The overrides that choose an engine and a model that it trains."""
    chosen: tuple[str, ...] = ENGINES[request.param]
    return chosen


BROKEN: dict[tuple[str, ...], str] = {
    ("optimizer=custom", "optimizer.type=''"): (
        "optimizer.type is empty: name a class, for example torch.optim.RMSprop."
    ),
    ("optimizer=custom", "optimizer.type=RMSProp"): (
        "optimizer.type=RMSProp is not in torch.optim: give its full path. Did you mean RMSprop?"
    ),
    ("optimizer=custom", "optimizer.type=torch.optim.LBFGS"): (
        "optimizer.type=torch.optim.LBFGS needs a closure, which the trainer does not give it."
    ),
    ("optimizer=adafactor", "optimizer.args.relative_step=true", "scheduler=cosine"): (
        "scheduler=cosine does nothing with Adafactor's relative_step, which sets its own rate: "
        "take scheduler=constant, or optimizer.args.relative_step=false and "
        "optimizer.args.warmup_init=false."
    ),
    ("optimizer=adafactor", "optimizer.args.warmup_init=true", "scheduler=rex"): (
        "scheduler=rex does nothing with Adafactor's relative_step, which sets its own rate: take "
        "scheduler=constant, or optimizer.args.relative_step=false and "
        "optimizer.args.warmup_init=false."
    ),
    ("optimizer=schedulefree_adamw", "scheduler=cosine"): (
        "scheduler=cosine does nothing with a schedule-free optimizer: take scheduler=constant; it "
        "warms up by optimizer.args.warmup_steps."
    ),
    ("optimizer=prodigy", "optimizer.learning_rate=1e-4"): (
        "optimizer.learning_rate=0.0001 is too small for Prodigy, which finds the rate itself and "
        "multiplies it by this: take 1.0."
    ),
    ("+optimizer.args.wieght_decay=0.1",): (
        "optimizer.type=adamw8bit has no argument wieght_decay. Did you mean weight_decay?"
    ),
    ("+optimizer.args.lr=0.1",): (
        "optimizer.args.lr is given already: set optimizer.learning_rate."
    ),
    ("+optimizer.args.eps=inf",): "optimizer.args.eps=inf must be finite.",
    ("scheduler.name=cosin",): "scheduler.name=cosin is not a choice. Did you mean cosine?",
    ("scheduler=cosine_with_min_lr", "scheduler.min_lr_ratio=null"): (
        "scheduler=cosine_with_min_lr needs scheduler.min_lr_ratio, for example 0.1."
    ),
    ("scheduler=rex", "scheduler.min_lr_ratio=2"): (
        "scheduler.min_lr_ratio=2 must be between 0 and 1."
    ),
    ("scheduler=cosine", "scheduler.min_lr_ratio=0.1"): (
        "scheduler.min_lr_ratio does nothing with scheduler=cosine: take "
        "scheduler=cosine_with_min_lr, rex or warmup_stable_decay."
    ),
    ("scheduler=cosine", "scheduler.num_cycles=3"): (
        "scheduler.num_cycles does nothing with scheduler=cosine: take "
        "scheduler=cosine_with_restarts, cosine_with_min_lr or warmup_stable_decay."
    ),
    ("scheduler=cosine", "scheduler.decay_fraction=0.5"): (
        "scheduler.decay_fraction does nothing with scheduler=cosine: take "
        "scheduler=warmup_stable_decay."
    ),
    ("scheduler=warmup_stable_decay", "scheduler.decay_fraction=0"): (
        "scheduler=warmup_stable_decay needs scheduler.decay_fraction, for example 0.2."
    ),
    ("scheduler.timescale=100",): (
        "scheduler.timescale does nothing with scheduler=constant: take scheduler=inverse_sqrt."
    ),
    ("scheduler.power=2",): (
        "scheduler.power does nothing with scheduler=constant: take scheduler=polynomial."
    ),
    ("scheduler=polynomial", "optimizer.learning_rate=1e-7"): (
        "optimizer.learning_rate=1e-07 must be above 1e-07, where scheduler=polynomial ends."
    ),
    ("precision.dit_dtype=bf16",): (
        "precision.dit_dtype=bf16 is not a choice. Did you mean bfloat16?"
    ),
    ("memory.vae_tile=96",): (
        "memory.vae_tile=96 must be a multiple of 64 (nearest: 128), or 0 for whole frames."
    ),
    ("network.exclude=['(']",): (
        "network.exclude: '(' is not a regular expression: missing ), unterminated subpattern at "
        "position 0."
    ),
    ("network.include=['.*attn.*']",): (
        "network.include does nothing alone, it adds back what network.exclude leaves out: add "
        "'network.exclude=[\".*\"]' to train just those."
    ),
    ("network.exclude=['.*']",): (
        "network.exclude leaves nothing to train: patterns match whole names such as "
        "double_blocks.0.img_mod.linear; add some back with network.include."
    ),
    ("+network.args.rank_droput=0.1",): (
        "network=lora has no argument rank_droput. Did you mean rank_dropout?"
    ),
    ("+network.args.include_patterns=x",): (
        "network.args.include_patterns: set network.include instead."
    ),
    ("+network.args.rank_dropout=1",): (
        "network.args.rank_dropout=1 must be at least 0 and below 1."
    ),
    ("+network.args.loraplus_lr_ratio=-1",): (
        "network.args.loraplus_lr_ratio=-1 must be a number above 0."
    ),
    ("optimizer=prodigy", "+network.args.loraplus_lr_ratio=4"): (
        "network.args.loraplus_lr_ratio=4 makes two learning rates, and Prodigy takes one: leave "
        "it out, or take another optimizer."
    ),
    ("network=lokr", "+network.args.factor=0"): (
        "network.args.factor=0 must be -1 or a whole number above 0."
    ),
    (*PROMPTS, "sampling.prompts=['a cat --w 3']"): (
        "sampling.prompts[0] has ' --' in it, where the trainer would read an option: leave it out."
    ),
    (*PROMPTS, 'sampling.prompts=["a\ncat"]'): (
        "sampling.prompts[0] has a line break, where the trainer would begin another prompt."
    ),
    (*PROMPTS, "sampling.prompts=['# one']"): (
        "sampling.prompts[0] begins with #, and would be skipped as a comment."
    ),
    (*PROMPTS, "sampling.prompts=[' ']"): "sampling.prompts[0] is empty.",
    (*PROMPTS, "sampling.prompts=[a]", "sampling.negative_prompt='x --y'"): (
        "sampling.negative_prompt has ' --' in it, where the trainer would read an option: leave "
        "it out."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.image_path=a --b.png"): (
        "sampling.image_path has ' --' in it, where the trainer would read an option: leave it out."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.image_path=a.png "): (
        "sampling.image_path='a.png ' begins or ends with a space: rename the file."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.seed=-1"): (
        "sampling.seed=-1 is too small: it must be at least 0."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.flow_shift=1e6"): (
        "sampling.flow_shift=1e+06 must be between 0.01 and 1000."
    ),
    ("precision.fp8_scaled=true",): "precision.fp8_scaled=true needs precision.fp8_base=true.",
    ("scheduler.warmup_steps=5",): (
        "scheduler=constant has no warm-up: take scheduler=constant_with_warmup, or "
        "scheduler.warmup_steps=0."
    ),
    ("training.keep_last=0",): "training.keep_last=0 is too small: it must be at least 1.",
    ("training.min_timestep=500", "training.max_timestep=400"): (
        "training.min_timestep=500 and training.max_timestep=400 must satisfy 0 <= min < max <= "
        "1000."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.width=200"): (
        "sampling.width/height=[200, 960]: 200 is not a multiple of 16 (nearest: 192)."
    ),
    ("optimizer=custom", "optimizer.type=Bogus"): (
        "optimizer.type=Bogus is not in torch.optim: give its full path."
    ),
    # What counts is the class, and not the name of the choice that it was set over.
    ("optimizer=adamw", "optimizer.type=Muon", "+optimizer.args.fused=true"): (
        "optimizer.type=Muon has no argument fused. There are: adjust_lr_fn, eps, momentum, "
        "nesterov, ns_coefficients, ns_steps, weight_decay."
    ),
    ("optimizer=custom", "optimizer.type=torch.optim.SGD", "+optimizer.args.momentm=0.9"): (
        "optimizer.type=torch.optim.SGD has no argument momentm. Did you mean momentum?"
    ),
    # bitsandbytes 0.50 has it no more.
    ("+optimizer.args.percentile_clipping=50",): (
        "optimizer.type=adamw8bit has no argument percentile_clipping. There are: betas, eps, "
        "is_paged, min_8bit_size, weight_decay."
    ),
    ("+optimizer.args.betas=0.9",): (
        "optimizer.args.betas=0.9 must be two numbers, each at least 0 and below 1, for example "
        "[0.9,0.999]."
    ),
    ("+optimizer.args.betas=[0.9,1]",): (
        "optimizer.args.betas=[0.9, 1] must be two numbers, each at least 0 and below 1, for "
        "example [0.9,0.999]."
    ),
    ("+optimizer.args.weight_decay=-1",): (
        "optimizer.args.weight_decay=-1 must be a number, at least 0."
    ),
    ("+optimizer.args.eps=small",): "optimizer.args.eps=small must be a number, at least 0.",
    ("optimizer=prodigy", "+optimizer.args.decouple=1"): (
        "optimizer.args.decouple=1 must be true or false."
    ),
    ("optimizer=adamw", "+optimizer.args.fused=1"): (
        "optimizer.args.fused=1 must be true, false or null."
    ),
    ("optimizer=adafactor", "+optimizer.args.eps=1e-3"): (
        "optimizer.args.eps=0.001 must be two numbers, each at least 0."
    ),
    ("optimizer=muon", "+optimizer.args.ns_steps=0"): (
        "optimizer.args.ns_steps=0 must be a whole number above 0."
    ),
    ("optimizer=muon", "+optimizer.args.adjust_lr_fn=rms"): (
        "optimizer.args.adjust_lr_fn=rms must be original, match_rms_adamw or null."
    ),
    ("optimizer=custom", "optimizer.type=dadaptation.DAdaptAdam"): (
        "optimizer.learning_rate=0.0001 is too small for DAdaptAdam, which finds the rate itself "
        "and multiplies it by this: take 1.0."
    ),
    (
        *("optimizer=adafactor", "optimizer.args.relative_step=true"),
        "+network.args.loraplus_lr_ratio=4",
    ): (
        "network.args.loraplus_lr_ratio=4 does nothing with Adafactor's relative_step, which sets "
        "its own rate: leave it out, or take optimizer.args.relative_step=false and "
        "optimizer.args.warmup_init=false."
    ),
    ("precision.dit_dtype=half",): (
        "precision.dit_dtype=half is not a choice. There are: bfloat16, float16, float32."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.guidance_scale=nan"): (
        "sampling.guidance_scale=nan must be between 0.01 and 1000."
    ),
}


# Each broken rule is reported in one line that says what is wrong and what would be right.
@pytest.mark.parametrize("overrides", BROKEN, ids=" ".join)
def test_rules_say_what_is_wrong(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    assert problems_of(compose(*engine, *overrides)) == [BROKEN[overrides]]


# What is right passes: the rules must not refuse what both trainers take.
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adafactor", "optimizer.args.relative_step=true"),
        ("optimizer=adafactor", "optimizer.args.relative_step=true", "network=loha"),
        ("optimizer=adafactor", "+optimizer.args.eps=[1e-30,1e-3]", "+optimizer.args.beta1=null"),
        ("optimizer=schedulefree_adamw", "+optimizer.args.warmup_steps=10"),
        ("optimizer=custom", "optimizer.type=Muon"),
        ("optimizer=custom", "optimizer.type=AdamW8bit"),
        ("optimizer=custom", "optimizer.type=some.library.Prodigy", "optimizer.learning_rate=1"),
        ("optimizer=custom", "optimizer.type=some.Sum", "+optimizer.args.anything=[a,{b: 1}]"),
        ("optimizer=adamw", "optimizer.type=Muon", "+optimizer.args.momentum=0.9"),
        ("optimizer=adamw", "+optimizer.args.fused=null"),
        ("+optimizer.args.betas=[0.9,0.99]", "+optimizer.args.weight_decay=0.01"),
        ("network.exclude=['.*']", "network.include=['.*attn.*']"),
        ("network.exclude=['.*_mod.*']", "+network.args.loraplus_lr_ratio=16"),
        ("optimizer=prodigy", "+network.args.loraplus_lr_ratio=1"),
        ("scheduler=cosine_with_min_lr", "scheduler.num_cycles=3"),
        ("network=lokr", "+network.args.factor=-1", "+network.args.rank_dropout=0.5"),
        ("network.exclude=['(?!.*attn).*']",),
        (*PROMPTS, "sampling.prompts=['I see a cat','- a dash']"),
        (*PROMPTS, "sampling.prompts=['N scale']", "sampling.negative_prompt=blur"),
        ("task=i2v", "training.i2v_unscaled_condition=true"),
    ],
    ids=" ".join,
)
def test_what_is_right_passes(engine: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    assert problems_of(compose(*engine, *overrides)) == []


# The schedules that pass are those that there are choices for.
def test_every_schedule_is_known() -> None:
    assert set(SCHEDULERS) == set(groups(conf_folder())["scheduler"])


# Warm-up and decay must fit into the run: otherwise it would begin with a rate that falls.
def test_a_decay_longer_than_the_run(engine: tuple[str, ...]) -> None:
    steps = ("training.max_steps=20", "scheduler=warmup_stable_decay")
    config = compose(*engine, "optimizer=adamw", *steps, "scheduler.warmup_steps=17")
    with pytest.raises(UserError) as error:
        plan_of(config, fake_facts(config, [fake_item("a.jpg")]))
    assert str(error.value) == (
        "scheduler.warmup_steps=17 and the 4 steps of scheduler.decay_fraction=0.2 must not exceed "
        "the run's 20 steps."
    )
    config = compose(*engine, "optimizer=adamw", *steps, "scheduler.warmup_steps=16")
    plan_of(config, fake_facts(config, [fake_item("a.jpg")]))


# rex ends with an error where its warm-up is longer than the run, once everything is cached.
def test_a_warmup_that_rex_refuses(engine: tuple[str, ...]) -> None:
    steps = ("training.max_steps=20", "scheduler=rex", "scheduler.warmup_steps=30")
    config = compose(*engine, "optimizer=adamw", *steps)
    with pytest.raises(UserError) as error:
        plan_of(config, fake_facts(config, [fake_item("a.jpg")]))
    assert str(error.value) == (
        "scheduler.warmup_steps=30 must not exceed the run's 20 steps (rex)."
    )
