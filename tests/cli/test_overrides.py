"""Paths from a shell reach the config as they were typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import compose

from runner.cli.overrides import quote, quote_paths

PATHS = [
    "data/my zip.zip",
    "~/photos",
    "a[1].zip",
    "it's.zip",
    'say "hi".zip',
    "été/ünï.zip",
    "a,b.zip",
    "a=b.zip",
    "(x){y}.zip",
    "back\\slash.zip",
    "end\\",
    "a\\'b",
    "$HOME.zip",
    "${x}.zip",
    "日本.zip",
    "#5.zip",
    "a:b.zip",
    "null.zip",
    "1.5",
    "'quoted.zip",
    " leading.zip",
    "%20.zip",
    "a b's [c], (d).zip",
]


# Any path a shell can pass works as a value, character for character.
@pytest.mark.parametrize("path", PATHS)
def test_paths_are_literal(path: str) -> None:
    assert compose(f"dataset.path={path}").dataset.path == path


# A value that is already quoted for Hydra is left as it is.
def test_quoted_paths_are_left() -> None:
    assert compose("dataset.path='my data.zip'").dataset.path == "my data.zip"


# Options that are not paths keep Hydra's grammar.
def test_other_options_are_untouched() -> None:
    arguments = ["dataset.resolution=[64,64]", "name='a b'", "-m", "task=i2v"]
    assert quote_paths(arguments, multirun=False) == arguments


# In a sweep, commas between paths sweep; a path with a comma that exists is one path.
def test_commas_sweep_unless_the_path_exists(tmp_path: Path) -> None:
    both = ["dataset.path=a.zip,b.zip"]
    assert quote_paths(both, multirun=True) == both
    real = tmp_path / "a,b.zip"
    real.touch()
    assert quote_paths([f"dataset.path={real}"], multirun=True) == [
        f"dataset.path={quote(str(real))}"
    ]


# An optimizer's and a network's own arguments are set like any option, new or not.
def test_own_arguments_need_no_plus() -> None:
    config = compose("optimizer=adafactor", "optimizer.args.weight_decay=0.01")
    assert config.optimizer.args["weight_decay"] == 0.01
    assert config.optimizer.args["relative_step"] is False
    config = compose("optimizer.args.relative_step=true", "network.args={rank_dropout: 0.1}")
    assert config.optimizer.args == {"relative_step": True}
    assert config.network.args == {"rank_dropout": 0.1}
