"""The table of the trainer's options against what it speaks of: our options, and the trainer's."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import get_type_hints

from runner.config.schema import options as our_options
from runner.formats.train_options import TABLE, TrainOptions
from runner.formats.trainer_options import TRAIN, ScriptOption, options

# What the embedded engine takes where a file says nothing and musubi-tuner has no value.
OTHER_DEFAULTS = {
    "log_with": "tensorboard",
    "lr_scheduler_args": [],
    "mixed_precision": "no",
    "network_args": [],
    "network_module": "",
    "optimizer_args": [],
}


def type_of(option: ScriptOption) -> str:
    """How the table writes the option's type, without None."""
    if option.nargs:
        return "list[str]"
    named = {"_int_or_float": "int | float", "int": "int", "float": "float"}
    return "bool" if option.flag else named.get(option.type, "str")


# Every row is an option of the trainer, with its type and its default, or an engine's own switch.
def test_rows_are_options_of_the_trainer() -> None:
    known = options(TRAIN)
    hints = get_type_hints(TrainOptions)
    for row in fields(TrainOptions):
        hint = hints[row.name]
        said = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else hint
        if TABLE[row.name].engine_only:
            assert (row.name in known, said, row.default) == (False, "bool", False)
            continue
        assert str(said).removesuffix(" | None") == type_of(known[row.name]), row.name
        required = row.default is row.default_factory is MISSING
        if not required:
            default = row.default if row.default_factory is MISSING else row.default_factory()
            assert default == OTHER_DEFAULTS.get(row.name, known[row.name].default), row.name


# A row without a value of its own has that of an option of ours, which is there.
def test_rows_name_options_of_ours() -> None:
    ours = {option.key for option in our_options()}
    plain = [row.set_by for row in TABLE.values() if row.value is None and row.set_by]
    plain += [row.value for row in TABLE.values() if isinstance(row.value, str)]
    assert set(plain) <= ours


# The original script's order has each place once.
def test_places_in_the_original_order() -> None:
    places = sorted(row.original for row in TABLE.values() if row.original is not None)
    assert places == list(range(1, len(places) + 1))
