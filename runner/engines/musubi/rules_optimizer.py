"""Rules on optimizers that only musubi-tuner v0.3.4 has; pure.

Rules that all engines share are in :mod:`runner.engines.rules_optimizer`.
"""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.schema import RunConfig
from runner.engines.optimizer_classes import SHORT_NAMES, is_adafactor


def optimizer(config: RunConfig) -> Iterator[str]:
    """Yield one line for each problem with the optimizer's class or its arguments."""
    name, args = config.optimizer.type, config.optimizer.args
    lowered = name.lower()
    if "." not in name and lowered.endswith("8bit") and lowered not in SHORT_NAMES:
        yield (
            f"optimizer.type={name} needs its full path, for example bitsandbytes.optim.Lion8bit."
        )
    if "." in name and is_adafactor(name) and args.get("relative_step", True):
        yield (
            f"optimizer.type={name} takes no learning rate unless optimizer.args.relative_step is "
            "false: take optimizer=adafactor."
        )
    for key, value in args.items():
        if "=" in repr(value):
            yield (
                f"optimizer.args.{key}={value!r} contains '=', at which musubi-tuner splits the "
                "argument: it can't be passed on."
            )
