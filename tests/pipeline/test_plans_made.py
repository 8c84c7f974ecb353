"""A plan is made when facts change and not otherwise, and nothing is looked up twice for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import executables_here, run_here
from other_processes import pictures
from third_engine import ThirdEngine, third_engine

from runner.config.schema import RunConfig
from runner.engines.registry import ENGINES
from runner.hub.weights import LocatedWeights
from runner.pipeline import executor
from runner.pipeline.context import Context
from runner.pipeline.stages.dataset import DATASET
from runner.pipeline.stages.train import TRAIN
from runner.pipeline.stages.weights import WEIGHTS
from runner.storage.shared_cache import SharedCache

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
    count(SharedCache, "full_keys")
    count(ThirdEngine, "weights")
    monkeypatch.setitem(ENGINES, "third", third_engine)
    return made


@pytest.fixture
def run(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the third engine on three pictures; what it said."""
    executables_here(monkeypatch)
    media = pictures(tmp_path / "media", 3)
    overrides = ["engine.name=third", "tracking=none", "dataset.resolution=[64,48]"]
    overrides += [f"output_dir={tmp_path / 'outputs'}", f"dataset.path={media}"]
    return lambda *more: run_here(*overrides, *more, folder=tmp_path, monkeypatch=monkeypatch)


# A run whose weights are there makes one plan, however much it encodes, lists the store once and
# looks at the weights once; so does one that finds everything done.
def test_one_plan_a_run(run: Callable[[], str], calls: Calls) -> None:
    once = {"make_plan": 1, "full_keys": 1, "weights": 1}
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
    assert calls == {"make_plan": 2, "full_keys": 1, "weights": 1}


def entry(folder: Path) -> Path:
    """One of the latents in the cache."""
    return next((folder / "outputs/cache/latents").glob("*/*.safetensors"))


# Once it trains a run needs the cache no more: what is lost or damaged then neither ends it nor is
# said to be made again, and its script stays what was run.
@pytest.mark.parametrize("skip", ["[]", "[latents]"])
@pytest.mark.parametrize("lost", [True, False])
def test_a_loss_after_the_encoding_ends_no_run(
    tmp_path: Path,
    run: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    skip: str,
    lost: bool,
) -> None:
    run()
    train = TRAIN.run

    def loses(context: Context) -> None:
        train(context)
        file = entry(tmp_path)
        file.chmod(0o644)
        if lost:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(TRAIN, "run", loses)
    said = run(f"stages.skip={skip}")
    assert "made again" not in said
    newest = max((tmp_path / "outputs/runs").glob("*/*"), key=lambda path: path.stat().st_mtime_ns)
    assert (newest / "lora_comfyui.safetensors").is_file()
    assert "to encode" not in (newest / "commands.sh").read_text()


# Weights that come late give entries their names: what is in the cache under these by then counts,
# also what another run made meanwhile, and the plan that is shown is the one that holds.
@pytest.mark.parametrize("skip", ["[]", "[latents]"])
def test_entries_that_came_with_the_weights_count(
    tmp_path: Path,
    run: Callable[..., str],
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    skip: str,
) -> None:
    run()
    kept, away = tmp_path / "outputs/cache/latents", tmp_path / "latents"
    kept.rename(away)
    found = ThirdEngine.weights

    def absent(engine: ThirdEngine, config: RunConfig, root: Path) -> LocatedWeights:
        facts = found(engine, config, root)
        return facts if kept.exists() else replace(facts, digests=None)

    def bring(context: Context) -> None:
        away.rename(kept)
        assert context.refresh_weights().present

    monkeypatch.setattr(ThirdEngine, "weights", absent)
    monkeypatch.setattr(WEIGHTS, "run", bring)
    calls.clear()
    said = run(f"stages.skip={skip}")
    assert "encoded" not in said
    assert skip != "[]" or "3 latents (done already)" in said
    assert calls["full_keys"] == 2


# What another run encodes between the plan and the stage is not encoded here, and the script holds
# what ran: neither the command that was planned nor files that it would not find.
def test_the_script_leaves_out_what_another_run_made(
    tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    kept, away = tmp_path / "outputs/cache/latents", tmp_path / "latents"
    kept.rename(away)
    fill = DATASET.run

    def meanwhile(context: Context) -> None:
        fill(context)
        away.rename(kept)

    monkeypatch.setattr(DATASET, "run", meanwhile)
    said = run()
    assert "3 latents to encode" in said and "encoded" not in said
    folders = sorted((tmp_path / "outputs/runs").glob("*/*"), key=lambda f: f.stat().st_ctime_ns)
    before, script = ((folder / "commands.sh").read_text() for folder in folders)
    assert "# latents: 3 latents to encode (to run)" in before and "latents.toml" in before
    assert "# latents: 3 latents to encode (done)" in script and "latents.toml" not in script
