"""A plan is made when facts change and not otherwise, and nothing is looked up twice for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import run_here
from other_processes import pictures
from third_engine import ThirdEngine, third_engine

from runner.engines.registry import ENGINES
from runner.pipeline import executor
from runner.storage.store import Store

Calls = Counter[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How often plans are made, the store listed and weights looked at."""
    made: Calls = Counter()

    def count(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            made[name] += 1
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(executor, "make_plan")
    count(Store, "names")
    count(ThirdEngine, "weights")
    monkeypatch.setitem(ENGINES, "third", third_engine)
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Runs the third engine on three pictures; what it said."""
    media = pictures(tmp_path / "media", 3)
    overrides = ["engine.name=third", "tracking=none", "dataset.resolution=[64,48]"]
    overrides += [f"output_dir={tmp_path / 'outputs'}", f"dataset.path={media}"]
    return lambda: run_here(*overrides, folder=tmp_path, monkeypatch=monkeypatch)


# A run whose weights are there makes one plan, however much it encodes, lists the store once and
# looks at the weights once; so does one that finds everything done.
def test_one_plan_a_run(run: Callable[[], str], calls: Calls) -> None:
    once = {"make_plan": 1, "names": 1, "weights": 1}
    assert "encoded 3/3" in run()
    assert calls == once
    calls.clear()
    assert "encoded" not in run()
    assert calls == once


# An entry that was counted on and is damaged is a change of facts: one more plan, no more listing.
def test_a_plan_more_for_damage(tmp_path: Path, run: Callable[[], str], calls: Calls) -> None:
    run()
    damaged = next((tmp_path / "outputs/cache/latents").glob("*/*.safetensors"))
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    calls.clear()
    assert "encoded 1/1" in run()
    assert calls == {"make_plan": 2, "names": 1, "weights": 1}
