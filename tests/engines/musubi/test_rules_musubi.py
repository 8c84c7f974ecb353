"""musubi-tuner's own rules: what it refuses, or misreads, is told before anything is downloaded."""

from __future__ import annotations

import inspect

import pytest
from conftest import compose, problems_of

from runner.config.groups import conf_folder, groups
from runner.engines.musubi.rules_optimizer import OPTIMIZER_ARGS, SCHEDULERS
from runner.formats.trainer_options import TRAIN

GROUPS = groups(conf_folder())
PROMPTS = ("sampling=prompts",)

BROKEN: dict[tuple[str, ...], str] = {
    ("optimizer=custom", "optimizer.type=''"): (
        "optimizer.type is empty: name a class, for example torch.optim.RMSprop."
    ),
    ("optimizer=custom", "optimizer.type=RMSProp"): (
        "optimizer.type=RMSProp is not in torch.optim: give its full path. Did you mean RMSprop?"
    ),
    ("optimizer=custom", "optimizer.type=PagedLion8bit"): (
        "optimizer.type=PagedLion8bit needs its full path, for example bitsandbytes.optim.Lion8bit."
    ),
    ("optimizer=custom", "optimizer.type=torch.optim.LBFGS"): (
        "optimizer.type=torch.optim.LBFGS needs a closure, which musubi-tuner does not give it."
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
    ("optimizer=custom", "optimizer.type=transformers.optimization.Adafactor"): (
        "optimizer.type=transformers.optimization.Adafactor takes no learning rate unless "
        "optimizer.args.relative_step is false: take optimizer=adafactor."
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
        "optimizer=adamw8bit has no argument wieght_decay. Did you mean weight_decay?"
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
        "scheduler=cosine_with_min_lr or scheduler=rex."
    ),
    ("scheduler=cosine", "scheduler.num_cycles=3"): (
        "scheduler.num_cycles does nothing with scheduler=cosine: take "
        "scheduler=cosine_with_restarts or scheduler=cosine_with_min_lr."
    ),
    ("scheduler.power=2",): (
        "scheduler.power does nothing with scheduler=constant: take scheduler=polynomial."
    ),
    ("scheduler=polynomial", "optimizer.learning_rate=1e-7"): (
        "optimizer.learning_rate=1e-07 must be above 1e-07, where scheduler=polynomial ends."
    ),
    ("precision=fp8", "precision.mixed_precision=no"): (
        "precision.fp8_base=true needs precision.mixed_precision=bf16 or fp16."
    ),
    ("precision.mixed_precision=no",): (
        "precision.mixed_precision=no needs precision.dit_dtype=float32: take precision=fp32."
    ),
    ("precision.dit_dtype=bf16",): (
        "precision.dit_dtype=bf16 is not a choice. Did you mean bfloat16?"
    ),
    ("precision=fp32", "training.attention=flash"): (
        "training.attention=flash needs half precision: take precision=bf16, or "
        "training.attention=sdpa."
    ),
    ("model.transformer=hunyuanvideo1.5_720p_t2v_fp16.safetensors",): (
        "model.transformer=hunyuanvideo1.5_720p_t2v_fp16.safetensors holds fp16 weights, which "
        "can't be trained in precision=bf16: take precision=fp16, or the bf16 file."
    ),
    ("memory=24gb", "memory.vae_tile=96"): (
        "memory.vae_tile=96 must be a multiple of 64 (nearest: 128), or 0 for whole frames."
    ),
    ("training.seed=4294967296",): "training.seed=4294967296 must be below 4294967296.",
    ("network.exclude=['(']",): (
        "network.exclude: '(' is no regular expression: missing ), unterminated subpattern at "
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
    ('network.exclude=[".*(?=attn).*"]',): (
        "network.exclude: '.*(?=attn).*' holds an equals sign, where musubi-tuner would cut it: "
        "names have none, so word it without (?= and (?<=."
    ),
    ("+network.args.verbose='a=b'",): (
        "network.args.verbose='a=b' holds an equals sign, where musubi-tuner would cut it: it "
        "can't be passed on."
    ),
    ("optimizer=custom", "optimizer.type=a.Sum", "+optimizer.args.rule=['lr=1']"): (
        "optimizer.args.rule=['lr=1'] holds an equals sign, where musubi-tuner would cut it: it "
        "can't be passed on."
    ),
    ("+network.args.rank_droput=0.1",): (
        "network=lora has no argument rank_droput. Did you mean rank_dropout?"
    ),
    ("+network.args.conv_dim=4",): (
        "network=lora has no argument conv_dim. There are: loraplus_lr_ratio, module_dropout, "
        "rank_dropout, verbose."
    ),
    ("network=loha", "+network.args.loraplus_lr_ratio=4"): (
        "network=loha has no argument loraplus_lr_ratio. There are: module_dropout, rank_dropout, "
        "verbose."
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
    ("training.weighting_scheme=logit_normal",): (
        "training.weighting_scheme=logit_normal draws timesteps, and does so only with "
        "training.timestep_sampling=sigma."
    ),
    ("training.timestep_sampling=sigma", "training.max_timestep=300"): (
        "training.min_timestep and max_timestep count from the noisy end with "
        "training.timestep_sampling=sigma: take uniform, sigmoid or shift."
    ),
    (*PROMPTS, "sampling.prompts=['a cat --w 3']"): (
        "sampling.prompts[0] has ' --' in it, where musubi-tuner would read an option: leave it "
        "out."
    ),
    (*PROMPTS, 'sampling.prompts=["a\ncat"]'): (
        "sampling.prompts[0] has a line break, where musubi-tuner would begin another prompt."
    ),
    (*PROMPTS, "sampling.prompts=['# one']"): (
        "sampling.prompts[0] begins with #, and would be skipped as a comment."
    ),
    (*PROMPTS, "sampling.prompts=['N scale railway']"): (
        "sampling.prompts[0] begins with 'N ', which would be read as a negative prompt: word it "
        "otherwise."
    ),
    (*PROMPTS, "sampling.prompts=[' ']"): "sampling.prompts[0] is empty.",
    (*PROMPTS, "sampling.prompts=[a]", "sampling.negative_prompt='x --y'"): (
        "sampling.negative_prompt has ' --' in it, where musubi-tuner would read an option: leave "
        "it out."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.image_path=a --b.png"): (
        "sampling.image_path has ' --' in it, where musubi-tuner would read an option: leave it "
        "out."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.image_path=a.png "): (
        "sampling.image_path='a.png ' begins or ends with a space: rename the file."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.steps=1001"): (
        "sampling.steps=1001 is too large: at most 1000."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.seed=-1"): (
        "sampling.seed=-1 is too small: it must be at least 0."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.flow_shift=1e6"): (
        "sampling.flow_shift=1e+06 must be between 0.01 and 1000."
    ),
    ("engine.extra_args=[--save_stat]",): (
        f"engine.extra_args: {TRAIN} has no option --save_stat. Did you mean --save_state?"
    ),
    ("engine.extra_args=[--logit_mean,high]",): (
        "engine.extra_args: --logit_mean must be a number, not 'high'."
    ),
    ("engine.extra_args=['--blocks_to_swap=4']",): (
        "engine.extra_args: --blocks_to_swap is set by the runner: use memory.blocks_to_swap "
        "instead."
    ),
    ("engine.extra_args=[--flash_attn]",): (
        "engine.extra_args: --flash_attn is set by the runner: use training.attention instead."
    ),
    ("engine.extra_args=[--sage_attn]",): (
        "engine.extra_args: --sage_attn can't be used: musubi-tuner refuses it in training."
    ),
    ("engine.extra_args=[--dim_from_weights]",): (
        "engine.extra_args: --dim_from_weights can't be used: it crashes; set network.rank to the "
        "file's rank."
    ),
    ("engine.extra_args=[--show_timesteps,console]",): (
        "engine.extra_args: --show_timesteps can't be used: it ends the trainer before training."
    ),
    ("engine.extra_args=[--sample_every_n_steps,0]",): (
        "engine.extra_args: --sample_every_n_steps 0 is too small: it must be at least 1."
    ),
    ("engine.extra_args=[--compile_cache_size_limit,0]",): (
        "engine.extra_args: --compile_cache_size_limit 0 is too small: it must be at least 1."
    ),
    ("engine.extra_args=[--vae_dtype,half]",): (
        "engine.extra_args: --vae_dtype can't be 'half': take float16, bfloat16 or float32."
    ),
    ("engine.extra_args=[--metadata_reso,544x960]",): (
        "engine.extra_args: --metadata_reso '544x960' must be one number or two with a comma, such "
        "as 544,960."
    ),
    ("engine.extra_args=[--lr_scheduler_type,StepLR,--lr_scheduler_args,'a=b=c']",): (
        "engine.extra_args: --lr_scheduler_args 'a=b=c' must be KEY=VALUE with one equals sign."
    ),
    ("engine.extra_args=[--lr_scheduler_type,StepLR,--lr_scheduler_args,'step_size=abc']",): (
        "engine.extra_args: --lr_scheduler_args 'step_size=abc': musubi-tuner reads the value as "
        "Python, and it must be a number, a list, True, False, None or a text in quotes."
    ),
    ("engine.extra_args=[--flash3]",): (
        "engine.extra_args: --flash3 can't be used: it is ignored beside the runner's own "
        "training.attention."
    ),
    ("engine.extra_args=[--lr_decay_steps,10%]",): (
        "engine.extra_args: --lr_decay_steps can't be used: no schedule that the "
        "runner offers reads it."
    ),
    ("engine.extra_args=[--lr_scheduler_timescale,10]",): (
        "engine.extra_args: --lr_scheduler_timescale can't be used: no schedule that the "
        "runner offers reads it."
    ),
    ("engine.extra_args=[--base_weights,/a,--base_weights_multiplier,nan]",): (
        "engine.extra_args: --base_weights_multiplier nan must be finite."
    ),
    ("engine.extra_args=[--async_upload]",): (
        "engine.extra_args: --async_upload needs --huggingface_repo_id."
    ),
    ("memory=24gb", "engine.extra_args=[--block_swap_ring_size,3]"): (
        "engine.extra_args: --block_swap_ring_size does nothing in memory=24gb without "
        "memory.blocks_to_swap above 0 and memory.h2d_only=true."
    ),
    ("memory.blocks_to_swap=52",): (
        "memory.blocks_to_swap=52 is too many: the network has 54 blocks and at most 51 can be "
        "swapped."
    ),
    ("precision.fp8_scaled=true",): "precision.fp8_scaled=true needs precision.fp8_base=true.",
    ("memory=24gb", "memory.h2d_only=true", "memory.checkpointing=none"): (
        "memory.checkpointing=none can't be with memory.h2d_only=true, as blocks are swapped in "
        "memory=24gb: take memory.checkpointing=full, or memory.h2d_only=false."
    ),
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
}


# Each broken rule is told in one line that says what is wrong and what would be right.
@pytest.mark.parametrize("overrides", BROKEN, ids=" ".join)
def test_rules_say_what_is_wrong(overrides: tuple[str, ...]) -> None:
    assert list(problems_of(compose(*overrides))) == [BROKEN[overrides]]


# What is right passes: the rules must not refuse what musubi-tuner takes.
@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adafactor", "optimizer.args.relative_step=true"),
        ("optimizer=schedulefree_adamw", "+optimizer.args.warmup_steps=10"),
        ("optimizer=custom", "optimizer.type=Muon"),
        ("optimizer=custom", "optimizer.type=AdamW8bit"),
        ("optimizer=custom", "optimizer.type=some.library.Prodigy", "optimizer.learning_rate=1"),
        ("+optimizer.args.betas=[0.9,0.99]", "+optimizer.args.weight_decay=0.01"),
        ("network.exclude=['.*']", "network.include=['.*attn.*']"),
        ("network.exclude=['.*_mod.*']", "+network.args.loraplus_lr_ratio=16"),
        ("optimizer=prodigy", "+network.args.loraplus_lr_ratio=1"),
        ("scheduler=cosine_with_min_lr", "scheduler.num_cycles=3"),
        ("network=lokr", "+network.args.factor=-1"),
        ("network.exclude=['(?!.*attn).*']",),
        ("precision=fp16", "model.transformer=a_fp16.safetensors"),
        ("training.timestep_sampling=sigma", "training.weighting_scheme=logit_normal"),
        (*PROMPTS, "sampling.prompts=['I see a cat','- a dash']"),
        (*PROMPTS, "sampling.prompts=['N scale']", "sampling.negative_prompt=blur"),
        (
            "engine.extra_args=[--sample_every_n_steps,50,--save_state_on_train_end,'--logit_mean=-0.5']",
        ),
        ("engine.extra_args=[--log_prefix,'a b',--base_weights,/a,/b]",),
        (
            "engine.extra_args=[--lr_scheduler_type,a.B,--lr_scheduler_args,'a=1e-3','b=[1,2]','c=\"d\"']",
        ),
        ("task=i2v", "training.i2v_unscaled_condition=true"),
        ("memory=12gb", "memory.blocks_to_swap=0", "memory.checkpointing=none"),
        ("memory=12gb", "memory.checkpointing=offload"),
        ("memory=12gb", "engine.extra_args=[--block_swap_ring_size,3]"),
    ],
    ids=" ".join,
)
def test_what_is_right_passes(overrides: tuple[str, ...]) -> None:
    assert list(problems_of(compose(*overrides))) == []


# The argument lists of optimizers are those of the libraries, where they are installed here.
def test_optimizer_arguments_are_the_libraries_own() -> None:
    import prodigyopt
    import schedulefree
    import torch

    classes = {
        "adamw": torch.optim.AdamW,
        "muon": torch.optim.Muon,
        "prodigy": prodigyopt.Prodigy,
        "schedulefree_adamw": schedulefree.AdamWScheduleFree,
    }
    for name, cls in classes.items():
        assert {"params", "lr", *OPTIMIZER_ARGS[name]} == set(inspect.signature(cls).parameters)
    assert set(OPTIMIZER_ARGS) == set(GROUPS["optimizer"]) - {"custom"}
    assert set(SCHEDULERS) == set(GROUPS["scheduler"])
