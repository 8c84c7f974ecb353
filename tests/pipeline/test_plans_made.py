"""A plan is made when facts change and not otherwise, and nothing is looked up twice for it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import compose
from other_processes import pictures
from third_engine import ThirdEngine, third_engine

from runner.config.composed import Composed
from runner.core.console import Console
from runner.engines import registry
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
    monkeypatch.setattr(executor, "raise_on_signals", lambda: None)
    registry.register("third", third_engine)
    return made


def run(folder: Path, *overrides: str) -> str:
    """A whole run of the third engine in this process; what it said."""
    from omegaconf import OmegaConf

    config = compose(
        *("engine.name=third", "tracking=none", f"output_dir={folder / 'outputs'}"),
        *(f"dataset.path={folder / 'media'}", "dataset.resolution=[64,48]", *overrides),
    )
    resolved: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    out = io.StringIO()
    console = Console.for_stream(out)
    prepared = executor.prepare(Composed(config, resolved, (), {}), console, folder)
    executor.execute(prepared, console, None)
    return out.getvalue()


# A run whose weights are there makes one plan, however much it encodes, lists the store once and
# looks at the weights once; so does one that finds everything done.
def test_one_plan_a_run(tmp_path: Path, calls: Calls) -> None:
    pictures(tmp_path / "media", 3)
    once = {"make_plan": 1, "names": 1, "weights": 1}
    assert "encoded 3/3" in run(tmp_path)
    assert calls == once
    calls.clear()
    assert "encoded" not in run(tmp_path)
    assert calls == once


# An entry that was counted on and is damaged is a change of facts: one more plan, no more listing.
def test_a_plan_more_for_damage(tmp_path: Path, calls: Calls) -> None:
    pictures(tmp_path / "media", 3)
    run(tmp_path)
    damaged = next((tmp_path / "outputs/cache/latents").glob("*/*.safetensors"))
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    calls.clear()
    assert "encoded 1/1" in run(tmp_path)
    assert calls == {"make_plan": 2, "names": 1, "weights": 1}
