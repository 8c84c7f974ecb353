"""The recorded options of musubi-tuner's scripts: arguments and tables are held to them."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from runner.formats.trainer_options import (
    TEXT,
    TRAIN,
    arguments_of,
    check_table,
    options,
    parse,
)

WRONG_ARGUMENTS = {
    "--blocks_to_swp 3": (f"{TRAIN} has no option --blocks_to_swp. Did you mean --blocks_to_swap?"),
    # argparse would take a shortened name; which option it meant could change with the version.
    "--blocks 3": f"{TRAIN} has no option --blocks. Did you mean --blocks_to_swap?",
    "--logit_mean high": "--logit_mean must be a number, not 'high'.",
    "--block_swap_ring_size 2.5": "--block_swap_ring_size must be a whole number, not '2.5'.",
    "--lr_decay_steps x%": (
        "--lr_decay_steps must be a whole number, a share or a percentage, not 'x%'."
    ),
    "--compile_mode quick": "--compile_mode can't be 'quick'. There are: default, "
    "max-autotune, max-autotune-no-cudagraphs, reduce-overhead.",
    "--save_state yes": "'yes' belongs to no option.",
    "--logit_mean": "--logit_mean needs a value.",
    "--logit_mean --save_state": "--logit_mean needs a value.",
    "word": "'word' belongs to no option.",
    "-x": f"{TRAIN} has no option -x.",
}


# Wrong arguments are reported in a line each, with the nearest name.
@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
def test_wrong_arguments(arguments: str) -> None:
    _, problems = parse(TRAIN, shlex.split(arguments))
    assert problems == [WRONG_ARGUMENTS[arguments]]


# Values are read as argparse reads them.
def test_arguments_are_read_as_argparse_does() -> None:
    words = "--logit_mean -1.5 --lr_warmup_steps 10% --lr_decay_steps 100 --seed=-3 --save_state"
    words += " --base_weights a b --network_args"
    values, problems = parse(TRAIN, words.split())
    assert problems == []
    assert values == {
        "logit_mean": -1.5,
        "lr_warmup_steps": 0.1,
        "lr_decay_steps": 100,
        "seed": -3,
        "save_state": True,
        "base_weights": ["a", "b"],
        "network_args": [],
    }


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"learnin_rate": 1.0}, f"{TRAIN} has no option learnin_rate. Did you mean learning_rate?"),
    ({"learning_rate": "1e-4"}, "learning_rate='1e-4' must be a number with a decimal point."),
    ({"max_grad_norm": 1}, "max_grad_norm=1 must be a number with a decimal point."),
    ({"network_dim": 8.0}, "network_dim=8.0 must be a whole number."),
    ({"seed": True}, "seed=True must be a whole number."),
    ({"sdpa": 1}, "sdpa=1 must be true or false."),
    ({"dit": 3}, "dit=3 must be a text."),
    ({"network_args": "a=b"}, "network_args='a=b' must be a list."),
    ({"network_args": [1]}, "network_args=1 must be a text."),
    (
        {"lr_warmup_steps": 100.0},
        "lr_warmup_steps=100.0 must be a whole number or a share below 1.",
    ),
    ({"mixed_precision": "bf61"}, "mixed_precision can't be 'bf61'. Did you mean bf16?"),
    ({"section": {"task": "v2v"}}, "task can't be 'v2v'. Did you mean t2v?"),
]


# What musubi-tuner would take from a file without a word is refused here.
@pytest.mark.parametrize(("table", "line"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_wrong_tables(table: dict[str, Any], line: str) -> None:
    assert check_table(TRAIN, table) == [line]


# A value that begins with a dash stays a value when the table is given as arguments.
def test_dashed_values_survive() -> None:
    table = {"output_name": "-lora", "network_args": ["a=b"], "sdpa": True, "compile": False}
    arguments = arguments_of(TRAIN, table)
    assert arguments == ["--output_name=-lora", "--network_args", "a=b", "--sdpa"]
    assert parse(TRAIN, arguments) == (
        {"output_name": "-lora", "network_args": ["a=b"], "sdpa": True},
        [],
    )


# The record says which options are required.
def test_required_options_are_known() -> None:
    assert [o.name for o in options(TEXT).values() if o.required] == [
        "byt5",
        "dataset_config",
        "text_encoder",
    ]
