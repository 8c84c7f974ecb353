"""musubi-tuner's own rules: what it refuses or misreads is reported before any download."""

from __future__ import annotations

import pytest
from conftest import compose, problems_of

from runner.formats.trainer_options import TRAIN

PROMPTS = ("sampling=prompts",)

BROKEN: dict[tuple[str, ...], str] = {
    ("optimizer=custom", "optimizer.type=PagedLion8bit"): (
        "optimizer.type=PagedLion8bit needs its full path, for example bitsandbytes.optim.Lion8bit."
    ),
    ("optimizer=custom", "optimizer.type=transformers.optimization.Adafactor"): (
        "optimizer.type=transformers.optimization.Adafactor takes no learning rate unless "
        "optimizer.args.relative_step is false: take optimizer=adafactor."
    ),
    ("precision=fp8", "precision.mixed_precision=no"): (
        "precision.fp8_base=true needs precision.mixed_precision=bf16 or fp16."
    ),
    ("precision.mixed_precision=no",): (
        "precision.mixed_precision=no needs precision.dit_dtype=float32: take precision=fp32."
    ),
    ("precision=fp32", "training.attention=flash"): (
        "training.attention=flash needs half precision: take precision=bf16, or "
        "training.attention=sdpa."
    ),
    ("model.transformer=hunyuanvideo1.5_720p_t2v_fp16.safetensors",): (
        "model.transformer=hunyuanvideo1.5_720p_t2v_fp16.safetensors holds fp16 weights, which "
        "can't be trained in precision=bf16: take precision=fp16, or the bf16 file."
    ),
    ("training.seed=4294967296",): "training.seed=4294967296 must be below 4294967296.",
    ('network.exclude=[".*(?=attn).*"]',): (
        "network.exclude: '.*(?=attn).*' contains '=', at which musubi-tuner splits the argument: "
        "rewrite the pattern without lookaheads (?= and lookbehinds (?<=."
    ),
    ("+network.args.verbose='a=b'",): (
        "network.args.verbose='a=b' contains '=', at which musubi-tuner splits the argument: it "
        "can't be passed on."
    ),
    ("optimizer=custom", "optimizer.type=a.Sum", "+optimizer.args.rule=['lr=1']"): (
        "optimizer.args.rule=['lr=1'] contains '=', at which musubi-tuner splits the argument: it "
        "can't be passed on."
    ),
    ("+network.args.conv_dim=4",): (
        "network=lora has no argument conv_dim. There are: loraplus_lr_ratio, module_dropout, "
        "rank_dropout, verbose."
    ),
    ("network=loha", "+network.args.loraplus_lr_ratio=4"): (
        "network=loha has no argument loraplus_lr_ratio. There are: module_dropout, rank_dropout, "
        "verbose."
    ),
    ("training.weighting_scheme=logit_normal",): (
        "training.weighting_scheme=logit_normal draws timesteps, and does so only with "
        "training.timestep_sampling=sigma."
    ),
    ("training.timestep_sampling=sigma", "training.max_timestep=300"): (
        "training.min_timestep and max_timestep count from the noisy end with "
        "training.timestep_sampling=sigma: take uniform, sigmoid or shift."
    ),
    (*PROMPTS, "sampling.prompts=['N scale railway']"): (
        "sampling.prompts[0] begins with 'N ', which would be read as a negative prompt: word it "
        "otherwise."
    ),
    (*PROMPTS, "sampling.prompts=[a]", "sampling.steps=1001"): (
        "sampling.steps=1001 is too large: at most 1000."
    ),
    ("engine.extra_args=[--save_stat]",): (
        f"engine.extra_args: {TRAIN} has no option --save_stat. Did you mean --save_state?"
    ),
    ("engine.extra_args=[--scale_weight_norms,high]",): (
        "engine.extra_args: --scale_weight_norms must be a number, not 'high'."
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
        "engine.extra_args: --metadata_reso is set by the runner: use dataset.resolution instead."
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
        "engine.extra_args: --lr_decay_steps is set by the runner: use scheduler.decay_fraction "
        "instead."
    ),
    ("engine.extra_args=[--lr_scheduler_timescale,10]",): (
        "engine.extra_args: --lr_scheduler_timescale is set by the runner: use "
        "scheduler.timescale instead."
    ),
    ("engine.extra_args=[--base_weights,/a,--base_weights_multiplier,nan]",): (
        "engine.extra_args: --base_weights_multiplier nan must be finite."
    ),
    ("engine.extra_args=[--async_upload]",): (
        "engine.extra_args: --async_upload needs --huggingface_repo_id."
    ),
    ("engine.cache_args=[--vae_dtyp,float32]",): (
        "engine.cache_args: the cache scripts have no option --vae_dtyp. Did you mean --vae_dtype?"
    ),
    ("engine.cache_args=['--vae_sample_size=64']",): (
        "engine.cache_args: --vae_sample_size is set by the runner: use memory.vae_tile instead."
    ),
    ("engine.cache_args=[--fp8_vl]",): (
        "engine.cache_args: --fp8_vl is set by the runner: use memory.fp8_text_encoder instead."
    ),
    ("engine.cache_args=[--debug_mode,image]",): (
        "engine.cache_args: --debug_mode can't be used: it shows the dataset instead of encoding "
        "it."
    ),
    ("engine.cache_args=[--num_workers,many]",): (
        "engine.cache_args: --num_workers must be a whole number, not 'many'."
    ),
    ("engine.cache_args=[--batch_size,0]",): (
        "engine.cache_args: --batch_size 0 is too small: it must be at least 1."
    ),
    ("engine.cache_args=[--vae_dtype,half]",): (
        "engine.cache_args: --vae_dtype can't be 'half': take float16, bfloat16 or float32."
    ),
    ("engine.cache_args=[cpu]",): "engine.cache_args: 'cpu' belongs to no option.",
    ("engine.extra_args=[--split_attn]",): (
        "engine.extra_args: --split_attn is set by the runner: use training.split_attention "
        "instead."
    ),
    ("memory=24gb", "engine.extra_args=[--block_swap_ring_size,3]"): (
        "engine.extra_args: --block_swap_ring_size does nothing in memory=24gb without "
        "memory.blocks_to_swap above 0 and memory.h2d_only=true."
    ),
    ("memory.blocks_to_swap=52",): (
        "memory.blocks_to_swap=52 is too many: the network has 54 blocks and at most 51 can be "
        "swapped."
    ),
    ("memory=24gb", "memory.h2d_only=true", "memory.checkpointing=none"): (
        "memory.h2d_only=true with block swap (memory=24gb) needs memory.checkpointing=full or "
        "offload, not none: take one of them, or memory.h2d_only=false."
    ),
}


# Each broken rule is reported in one line that says what is wrong and what would be right.
@pytest.mark.parametrize("overrides", BROKEN, ids=" ".join)
def test_rules_say_what_is_wrong(overrides: tuple[str, ...]) -> None:
    assert list(problems_of(compose(*overrides))) == [BROKEN[overrides]]


# What is right passes: the rules must not refuse what musubi-tuner takes.
@pytest.mark.parametrize(
    "overrides",
    [
        ("precision=fp16", "model.transformer=a_fp16.safetensors"),
        ("training.timestep_sampling=sigma", "training.weighting_scheme=logit_normal"),
        (
            "engine.extra_args=[--sample_every_n_steps,50,--save_state_on_train_end,'--scale_weight_norms=1.5']",
        ),
        ("engine.extra_args=[--log_prefix,'a b',--base_weights,/a,/b]",),
        (
            "engine.extra_args=[--lr_scheduler_type,a.B,--lr_scheduler_args,'a=1e-3','b=[1,2]','c=\"d\"']",
        ),
        ("+network.args.verbose=true",),
        ("memory=12gb", "memory.blocks_to_swap=0", "memory.checkpointing=none"),
        ("memory=12gb", "memory.checkpointing=offload"),
        ("memory=12gb", "engine.extra_args=[--block_swap_ring_size,3]"),
    ],
    ids=" ".join,
)
def test_what_is_right_passes(overrides: tuple[str, ...]) -> None:
    assert list(problems_of(compose(*overrides))) == []
