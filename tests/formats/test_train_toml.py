"""train.toml: how many checkpoints are kept, in the words of the trainer."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from conftest import compose, fake_facts, fake_item, plan_of


# training.keep_last counts checkpoints of each kind that is saved. The trainer counts those by
# steps in steps: it keeps the newest and all that are no further behind.
@pytest.mark.parametrize(
    ("chosen", "epochs", "steps"),
    [
        (("save_every_epochs=2",), None, None),
        (("save_every_epochs=2", "keep_last=3"), 3, None),
        (("save_every_epochs=null", "save_every_steps=10", "keep_last=3"), None, 20),
        (("save_every_epochs=null", "save_every_steps=10", "keep_last=1"), None, 0),
        (("save_every_epochs=2", "save_every_steps=10", "keep_last=2"), 2, 10),
        (("save_every_epochs=2", "save_every_steps=10"), None, None),
    ],
)
def test_so_many_checkpoints_are_kept(
    chosen: tuple[str, ...], epochs: int | None, steps: int | None
) -> None:
    config = compose(*(f"training.{option}" for option in chosen))
    plan = plan_of(config, fake_facts(config, [fake_item("a.jpg")]))
    table: dict[str, Any] = tomllib.loads(dict(plan.files)["train.toml"])
    assert (table.get("save_last_n_epochs"), table.get("save_last_n_steps")) == (epochs, steps)
