"""Options that are set and do nothing, of those that the engines share; pure.

One that the command line names is an error. Others are notices of the plan: a recipe's value must
not forbid to change what it is for.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.option import Needs
from runner.config.rules import value_of
from runner.config.schema import RunConfig, SamplingConfig, options
from runner.engines import rules, rules_optimizer
from runner.engines.base import IdleOption


def idle_options(config: RunConfig, *, only_clips: bool) -> Iterator[IdleOption]:
    """Yield the options that are away from their defaults and do nothing.

    Args:
        config: the run's config.
        only_clips: whether the dataset has clips and no pictures.
    """
    yield from _without_effect(config)
    if config.sampling.name == "none":
        for option in options(SamplingConfig, "sampling."):
            if option.key != "sampling.name" and value_of(config, option.key) != option.default:
                yield _of_previews(option.key)
    if only_clips:
        yield from _buckets_of_clips(config)


def notices(config: RunConfig, *, steps: int, clips: bool) -> Iterator[str]:
    """Yield warnings about settings that do nothing or are probably unintended.

    How previews would be made is no news without them: recipes say it for those who want some.
    """
    yield from rules_optimizer.notices(config, steps=steps)
    for option in _without_effect(config):
        yield option.line
    if config.sampling.name == "none" and config.sampling.prompts:
        yield _of_previews("sampling.prompts").line
    if clips:
        for option in _buckets_of_clips(config):
            yield option.line


def _of_previews(key: str) -> IdleOption:
    return IdleOption(key, f"{key} does nothing with sampling=none: add sampling=prompts.")


def _without_effect(config: RunConfig) -> Iterator[IdleOption]:
    network, training, sampling = config.network, config.training, config.sampling
    yield from rules_optimizer.idle_options(config)
    if network.dropout and network.name != "lora":
        yield IdleOption(
            "network.dropout",
            f"network.dropout does nothing with network={network.name}; "
            "network.args.rank_dropout and network.args.module_dropout do.",
        )
    yield from _without_what_they_need(config)
    if training.keep_last and not (training.save_every_epochs or training.save_every_steps):
        yield IdleOption(
            "training.keep_last",
            "training.keep_last does nothing without checkpoints: set training.save_every_epochs "
            "or training.save_every_steps.",
        )
    # experiment=original sets it for both tasks.
    original = config.engine.arguments == "command_line"
    if training.i2v_unscaled_condition and config.task.name != "i2v" and not original:
        yield IdleOption(
            "training.i2v_unscaled_condition",
            "training.i2v_unscaled_condition does nothing with task=t2v, which has no condition: "
            "leave it out, or take task=i2v.",
        )
    if sampling.name == "prompts" and sampling.image_path and config.task.name != "i2v":
        yield IdleOption(
            "sampling.image_path",
            "sampling.image_path does nothing with task=t2v, whose previews begin from noise: "
            "leave it out, or take task=i2v.",
        )


def _without_what_they_need(config: RunConfig) -> Iterator[IdleOption]:
    """Yield options that are set while the option that they need has another value."""
    sources = [source for _, source in rules.datasets(config)]
    for option in options():
        needs = option.needs
        if needs is None:
            continue
        group, _, name = option.key.rpartition(".")
        value = value_of(config, option.key)
        if group == "dataset":
            other = needs.key.removeprefix("dataset.")
            chosen = {rules.own(source, config.dataset, other) for source in sources}
            values = {rules.own(source, config.dataset, name) for source in sources}
            if values != {option.default} and chosen.isdisjoint(needs.values):
                yield IdleOption(
                    option.key if value != option.default else "dataset.sources",
                    f"{option.key} does nothing without {needs.key}={needs.values[0]}.",
                )
        elif value != option.default and not _met(needs, config):
            yield IdleOption(
                option.key,
                f"{option.key}={_text(value)} does nothing with "
                f"{needs.key}={value_of(config, needs.key)}: take {_choices(needs)}.",
            )
    training = config.training
    whole = training.min_timestep is None and training.max_timestep is None
    if whole and training.preserve_distribution_shape and training.timestep_sampling != "sigma":
        yield IdleOption(
            "training.preserve_distribution_shape",
            "training.preserve_distribution_shape does nothing without a range: set "
            "training.min_timestep or training.max_timestep.",
        )


def _met(needs: Needs, config: RunConfig) -> bool:
    if value_of(config, needs.key) in needs.values:
        return True
    return needs.otherwise is not None and _met(needs.otherwise, config)


def _choices(needs: Needs) -> str:
    text = f"{needs.key}={' or '.join(needs.values)}"
    return text if needs.otherwise is None else f"{text}, or {_choices(needs.otherwise)}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _buckets_of_clips(config: RunConfig) -> Iterator[IdleOption]:
    for key, source in rules.datasets(config):
        for flag, right in (("enable_bucket", True), ("bucket_no_upscale", False)):
            if rules.own(source, config.dataset, flag) is not right:
                by_source = key != "dataset" and getattr(source, flag) is not None
                yield IdleOption(
                    "dataset.sources" if by_source else f"dataset.{flag}",
                    f"{key}.{flag}={str(not right).lower()} does nothing for clips, which are "
                    "sorted into buckets and enlarged to them in any case.",
                )
