"""The stages that fill the cache: nothing twice, nothing lost, nothing damaged, nothing else.

What runs here are the runner's own stages, in processes of their own where several are meant, on
an encoder that counts (see cache_process.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cache_process import context_of, fake_musubi, prepare, with_musubi
from in_process import program_here
from other_processes import ended, none_left, pictures, said, start, zipped

from runner.core.console import Console
from runner.core.errors import StageError, UserError
from runner.storage.leases import Leases
from runner.storage.shared_cache import cache_key, note_of

__all__ = ("none_left",)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def encoded(log: Path) -> list[str]:
    """What was encoded, a line for each call of the encoder."""
    return log.read_text().splitlines() if log.exists() else []


def sums(folder: Path) -> dict[str, str]:
    """The checksum of every file below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def entries(outputs: Path) -> list[Path]:
    """Every entry of the cache."""
    return [
        file
        for namespace in ("media", "latents", "text")
        for file in sorted((outputs / "cache" / namespace).glob("*/*"))
        if file.suffix != ".json"
    ]


def leftovers(outputs: Path) -> list[str]:
    """Files of claims and locks that ought to be gone when no process is left."""
    cache = outputs / "cache"
    found = [*(cache / "claims").iterdir(), *cache.glob("uses/*.lock"), *cache.rglob("*.tmp")]
    return [str(file) for file in found]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name holds what a path may hold, with the encoder's log in it."""
    folder = tmp_path / "it's [a] folder, ünïcode"
    folder.mkdir()
    monkeypatch.setenv("FAKE_LOG", str(folder / "log"))
    fake_musubi(folder / "musubi")
    return folder


def writes(monkeypatch: pytest.MonkeyPatch, here: Path, code: str) -> None:
    """Have the encoder write by this code, see cache_process.py."""
    (here / "writer.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("FAKE_WRITER", str(here / "writer.py"))


def prepared(
    outputs: Path, media: Path, *overrides: str, into: Path | None = None
) -> tuple[Any, str]:
    """Prepare a run in this process, in an earlier run's folder if one is named."""
    stream = io.StringIO()
    console = Console.for_stream(stream)
    context = context_of(outputs, media, *with_musubi(outputs), *overrides, console=console)
    if into is not None:
        context.run_dir = into
    prepare(context)
    return context, stream.getvalue()


# Eight runs on one dataset at once: all end well, every entry is made exactly once, those that
# find it being made say that they wait, and no lock or claim is left behind.
def test_eight_at_once_make_everything_once(here: Path) -> None:
    media = zipped(pictures(here / "media", 12), here / "twelve.zip")
    log, gate = here / "log", here / "gate"
    processes = [start(here / "out", media, log, FAKE_GATE=str(gate)) for _ in range(8)]
    waiting = "      waiting for 12 latents that another run encodes: runs/"
    until(lambda: sum(waiting in said(process) for process in processes) == 7)
    gate.touch()
    for process in processes:
        assert ended(process).count("waiting for 12 latents") <= 1
    counts = Counter(encoded(log))
    assert len(counts) == 24
    assert set(counts.values()) == {1}
    assert len(entries(here / "out")) == 12 * 3
    runs = list((here / "out" / "runs").glob("*/*"))
    assert len(runs) == 8
    for run in runs:
        assert len(list((run / "cache" / "0-images").iterdir())) == 24
        assert len(list((run / "dataset" / "media").iterdir())) == 12
    assert leftovers(here / "out") == []


# A run that waits goes on with what a killed one left: all that was unfinished, made once more.
def test_a_killed_makers_entries_are_taken_over(here: Path) -> None:
    media, log = pictures(here / "media", 4), here / "log"
    first = start(here / "out", media, log, FAKE_GATE=str(here / "never"))
    until(lambda: len(encoded(log)) == 1)
    second = start(here / "out", media, log)
    until(lambda: "waiting for 4 latents" in said(second))
    assert f"(process {first.pid})" in said(second)
    first.kill()
    first.wait()
    assert "encoded 4/4" in ended(second)
    assert len(entries(here / "out")) == 8
    assert leftovers(here / "out") == []


# What another run failed to make, the run that waited for it makes.
def test_a_failed_makers_entries_are_taken_over(here: Path) -> None:
    media, log, gate = pictures(here / "media", 4), here / "log", here / "gate"
    first = start(here / "out", media, log, FAKE_FAILS="3", FAKE_GATE=str(gate))
    until(lambda: len(encoded(log)) == 1)
    second = start(here / "out", media, log)
    until(lambda: "waiting for 4 latents" in said(second))
    gate.touch()
    assert first.wait(timeout=120) == 1
    assert "the encoder failed as it was asked" in said(first)
    # Three latents of the failed run were kept, and the fourth was made by the other.
    assert "encoded 1/1" in ended(second)
    assert len([line for line in encoded(log) if line.startswith("latents")]) == 4


# What another run finishes between this one's look and its claim is not made again.
def test_a_claim_looks_again(here: Path, monkeypatch: Any) -> None:
    media, out = pictures(here / "media", 3), here / "out"
    real = Leases.lease_for_making
    others: list[int] = []

    def overtaken(self: Leases, names: Any, run: str) -> Any:
        if not others:
            others.append(1)
            prepared(out, media)
        return real(self, names, run)

    monkeypatch.setattr(Leases, "lease_for_making", overtaken)
    prepared(out, media)
    assert others
    assert set(Counter(encoded(here / "log")).values()) == {1}


# Runs on different datasets don't wait for each other; of datasets that overlap only the common
# part is waited for, after the rest was made.
def test_only_common_entries_are_waited_for(here: Path) -> None:
    log, other, gate = here / "log", here / "other log", here / "gate"
    first = start(here / "out", pictures(here / "a", 4), log, FAKE_GATE=str(gate))
    until(lambda: len(encoded(log)) == 1)
    assert "waiting" not in ended(start(here / "out", pictures(here / "b", 4, first=50), other))
    assert len(encoded(other)) == 8
    pictures(here / "b", 2, first=60)
    third = start(here / "out", pictures(here / "b", 2), other)
    until(lambda: "waiting for 2 latents" in said(third))
    assert "encoded 2/2" in said(third)
    assert len(encoded(other)) == 10
    assert first.poll() is None
    gate.touch()
    ended(first)
    ended(third)
    every = Counter(line for line in (*encoded(log), *encoded(other)) if line[0] == "l")
    assert set(every.values()) == {1}
    assert len(every) == 10


def flip(file: Path) -> None:
    """Change one bit, as a failing disk does, and nothing that a listing shows."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    overwrite(file, bytes(data))


def overwrite(file: Path, data: bytes) -> None:
    file.chmod(0o644)
    file.write_bytes(data)
    file.chmod(0o444)


def in_namespace(outputs: Path, namespace: str) -> list[Path]:
    return [file for file in entries(outputs) if file.parent.parent.name == namespace]


# A cut entry and one with a flipped bit are found when a run uses them, reported in one line per
# namespace, and made again in that run; the others stay as they are, and the next run finds nothing
# wrong.
def test_damage_is_found_and_mended(here: Path) -> None:
    media, out = zipped(pictures(here / "media", 3), here / "three.zip"), here / "out"
    prepared(out, media)
    before = sums(out / "cache")
    made = len(encoded(here / "log"))
    cut, flipped = in_namespace(out, "latents")[:2]
    overwrite(cut, cut.read_bytes()[:-3])
    flip(flipped)
    caption = in_namespace(out, "text")[0]
    flip(caption)
    unpacked = in_namespace(out, "media")[0]
    flip(unpacked)
    context, words = prepared(out, media)
    assert words.count("note: ") == 3
    assert "2 of the latents were damaged in the cache and are made again: p00" in words
    assert "1 of the encoded captions was damaged in the cache and is made again: p00" in words
    assert "1 of the unpacked media was damaged in the cache and is made again: p00" in words
    assert len(encoded(here / "log")) == made + 3
    after = sums(out / "cache")
    # The zip holds what the picture was.
    mended = {str(file.relative_to(out / "cache")) for file in (cut, flipped, caption)}
    assert {name for name in before if name[0] != "u" and before[name] != after[name]} == {
        *mended,
        *(f"{name}.json" for name in mended),
    }
    for file in (context.run_dir / "cache").rglob("*.safetensors"):
        assert len(file.read_bytes()) == max(f.stat().st_size for f in in_namespace(out, "latents"))
    assert prepared(out, media)[1].count("note: ") == 0
    assert len(encoded(here / "log")) == made + 3
    assert leftovers(out) == []


# A run that already has links to a damaged entry has the new one as soon as another made it again,
# and at no moment none.
def test_links_of_others_outlive_a_mended_entry(here: Path, monkeypatch: Any) -> None:
    media, out = pictures(here / "media", 1), here / "out"
    first, _ = prepared(out, media)
    (place,) = (first.run_dir / "cache").rglob("*_hv15.safetensors")
    flip(place.resolve())
    damaged = place.read_bytes()
    replaced: list[bytes] = []
    real = Path.replace

    def watched(self: Path, target: Path) -> Path:
        replaced.append(place.read_bytes())
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    prepared(out, media)
    assert set(replaced) == {damaged, place.read_bytes()}
    assert len(replaced) >= 2


def as_earlier(outputs: Path, engine: str) -> list[Path]:
    """Give the latents and captions the keys that they had before engines shared them."""
    renamed = []
    for file in [*in_namespace(outputs, "latents"), *in_namespace(outputs, "text")]:
        note = json.loads(note_of(file).read_text())
        note["made_of"] = {"engine": engine, **note["made_of"]}
        key = cache_key(note["made_of"])
        earlier = file.parent.parent / key[:2] / key
        earlier.parent.mkdir(exist_ok=True)
        file.rename(earlier)
        note_of(file).unlink()
        note_of(earlier).write_text(json.dumps(note))
        renamed.append(earlier)
    return renamed


# What an earlier version encoded on either engine is used by both at once, where it lies: nothing
# is encoded, renamed or copied, so no process can get in another's way. The links of the runs lead
# to it, and it is in use as long as they last.
@pytest.mark.parametrize("maker", ["musubi", "diffusers"])
def test_earlier_entries_are_used_by_many(here: Path, maker: str) -> None:
    media, out, log = pictures(here / "media", 3), here / "out", here / "log"
    shutil.rmtree(prepared(out, media)[0].run_dir)
    earlier = set(as_earlier(out, maker))
    before = sums(out / "cache" / "latents") | sums(out / "cache" / "text")
    end = here / "end"
    processes = [start(out, media, log, FAKE_END=str(end)) for _ in range(3)]
    prepared(out, media, "engine=diffusers")
    until(lambda: all("text" in said(process) for process in processes))
    with Leases(out / "cache").locked():
        held = Leases(out / "cache").leased_keys()
    assert {f"{file.parent.parent.name}/{file.name}" for file in earlier} <= held
    end.touch()
    for process in processes:
        ended(process)
    assert len(encoded(log)) == 6
    assert sums(out / "cache" / "latents") | sums(out / "cache" / "text") == before
    runs = list((out / "runs").glob("*/*"))
    assert len(runs) == 4
    for run in runs:
        assert {file.resolve() for file in (run / "cache").rglob("*.safetensors")} == earlier


# A damaged entry of an earlier version is made again, under the key of today, and from then on that
# one is used; the others stay as they are.
def test_a_damaged_earlier_entry_is_made_again(here: Path) -> None:
    media, out = pictures(here / "media", 3), here / "out"
    prepared(out, media)
    today = in_namespace(out, "latents")
    earlier = as_earlier(out, "diffusers")
    flip(earlier[0])
    overwrite(earlier[-1], b"cut")
    _, words = prepared(out, media)
    assert "1 of the latents was damaged in the cache and is made again: p00" in words
    assert "1 of the encoded captions was damaged in the cache and is made again: p00" in words
    assert len(encoded(here / "log")) == 6 + 2
    assert today[0] in in_namespace(out, "latents")
    assert len(in_namespace(out, "latents")) == 4
    assert "note" not in prepared(out, media)[1]
    assert len(encoded(here / "log")) == 6 + 2


# An entry with no note, or with one that has no digest, is made again: nothing can vouch for it.
def test_entries_without_a_digest_are_made_again(here: Path) -> None:
    media, out = pictures(here / "media", 3), here / "out"
    prepared(out, media)
    without, old = in_namespace(out, "latents")[:2]
    Path(f"{without}.json").unlink()
    Path(f"{old}.json").write_text('{"media": "as older versions wrote it"}')
    _, words = prepared(out, media)
    assert "1 of the latents was damaged in the cache and is made again" in words
    assert "1 of the latents was cached without a checksum and is made again" in words
    assert len([line for line in encoded(here / "log") if line[0] == "l"]) == 5
    assert "note" not in prepared(out, media)[1]


# A skipped stage makes nothing: without a training what is damaged is left out, and the run says
# so.
def test_a_skipped_stage_leaves_damage_out(here: Path) -> None:
    media, out = pictures(here / "media", 3), here / "out"
    prepared(out, media)
    flip(in_namespace(out, "latents")[0])
    context, words = prepared(out, media, "stages.skip=[latents,train]")
    assert "was damaged in the cache and is left out, as the stage is skipped" in words
    assert len(list((context.run_dir / "cache").rglob("*_hv15.safetensors"))) == 2
    assert len(encoded(here / "log")) == 6


# A training never gets fewer samples because a stage was skipped: a picture that is new, a caption
# that was changed and a latent that is damaged end the run before it; with all there, it goes on.
def test_a_skipped_stage_must_lack_nothing(here: Path, monkeypatch: Any) -> None:
    from runner.engines.diffusers import weights

    found = weights.model_weights

    def with_weights(*given: Any) -> Any:
        return dataclasses.replace(found(*given), digests={"vae": "of the weights"})

    monkeypatch.setattr(weights, "model_weights", with_weights)
    media, out = pictures(here / "media", 3), here / "out"
    prepared(out, media)
    both = "stages.skip=[latents,text]"
    assert len(listing(prepared(out, media, both)[0].run_dir / "cache")) == 6
    pictures(media, 1, first=3)
    (media / "p001.txt").write_text("another caption")
    with pytest.raises(UserError) as caught:
        prepared(out, media, "stages.skip=[text]")
    assert str(caught.value) == (
        "stages.skip=[text], but the encoded captions of 2 of 4 items are not in the cache, or "
        "damaged there: p001.png, p003.png. They would not be trained on: take text out of "
        "stages.skip, what is cached is not encoded again."
    )
    with pytest.raises(UserError, match=r"the latents of 1 of 4 items are .*: p003\.png\. "):
        prepared(out, media, "stages.skip=[latents]")
    prepared(out, media)
    prepared(out, media, both)
    flip(in_namespace(out, "latents")[0])
    with pytest.raises(UserError, match=r"the latents of 1 of 4 items are .*damaged"):
        prepared(out, media, both)
    assert len(encoded(here / "log")) == 6 + 3


# A forced stage makes all of its entries again, each once, and no other stage's.
def test_force_makes_all_again(here: Path) -> None:
    media, out = pictures(here / "media", 3), here / "out"
    prepared(out, media)
    _, words = prepared(out, media, "stages.force=[latents]")
    assert "encoded 3/3" in words
    counts = Counter(encoded(here / "log"))
    assert sorted(counts.values()) == [1, 1, 1, 2, 2, 2]
    assert all(line.startswith("latents") for line, count in counts.items() if count == 2)


# A dry run compares sizes and reads no entry: a cut one is to be encoded, a flipped bit is left
# for the run to find, and nothing is said or written.
def test_a_dry_run_reads_no_entries(here: Path, monkeypatch: Any) -> None:
    media, out = pictures(here / "media", 3), here / "out"
    context = context_of(out, media, "engine=diffusers")
    for entry in context.plan.entries:
        staged = here / "staged"
        staged.write_bytes(os.urandom(64))
        context.cache.commit(entry.namespace, entry.key, staged, entry.cache_inputs)
    cut, flipped = in_namespace(out, "latents")[:2]
    overwrite(cut, cut.read_bytes()[:-3])
    flip(flipped)
    before = sums(out)
    asked = ["engine=diffusers", "model=tiny", "memory=cpu", "optimizer=adamw", "precision=fp32"]
    done = program_here(
        *asked, "dry_run=true", f"output_dir={out}", f"dataset.path={media}",
        "dataset.resolution=[64,48]", cwd=here,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "latents   to run  1 latent to encode, 2 cached" in done.out
    assert "text      done    3 captions" in done.out
    assert "damaged" not in done.out + done.err
    assert sums(out) == before


# Whatever musubi-tuner does in its own cache folder, no file of the store changes: it never works
# in the store, nor in a folder with links into it. Run three times over, with captions changed.
def test_musubi_never_writes_through_a_link(here: Path) -> None:
    media, out = pictures(here / "media", 4), here / "out"
    zip_ = zipped(media, here / "four.zip")
    prepared(out, zip_)
    before = sums(out / "cache")
    namespaces = ("media/", "latents/", "text/")
    store = {name: sum_ for name, sum_ in before.items() if name.startswith(namespaces)}
    assert len(store) == 2 * 12
    pictures(media, 2, first=4)
    (media / "p000.txt").write_text("another caption")
    first, _ = prepared(out, zipped(media, here / "six.zip"))
    prepared(out, zip_, into=first.run_dir)
    after = sums(out / "cache")
    assert {name: after[name] for name in store} == store
    assert len(entries(out)) == 6 + 6 + 7
    for file in entries(out):
        note = json.loads(Path(f"{file}.json").read_text())
        assert hashlib.sha256(file.read_bytes()).hexdigest() == note["sha256"]
        assert not os.access(file, os.W_OK) or os.geteuid() == 0
        assert file.stat().st_mode & 0o222 == 0


def listing(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if not f.is_dir())


# A run's folders hold its dataset's items and nothing else, in whatever state an earlier attempt
# in the same folder left them: other items, half-written files, folders.
def test_stale_files_go_away(here: Path) -> None:
    media, out = pictures(here / "media", 4), here / "out"
    first, _ = prepared(out, media)
    run = first.run_dir
    assert len(listing(run / "cache")) == 8
    cache = run / "cache" / "0-images"
    (cache / "left_0064x0048_hv15.safetensors").write_bytes(b"of another dataset")
    (cache / ".half.safetensors.77.tmp").write_bytes(b"half")
    (run / "cache" / "9-videos").mkdir()
    (run / "cache" / "9-videos" / "clip_hv15_te.safetensors").symlink_to("nowhere")
    (run / "dataset" / "7-images.jsonl").write_text("{}")
    (run / "dataset" / "media" / "left.png").symlink_to("nowhere")
    for name in ("p001.png", "p001.txt"):
        (media / name).unlink()
    context, _ = prepared(out, media, into=run)
    stages = [context.plan.stage(name) for name in ("latents", "text")]
    wanted = {place for stage in stages for entry in stage.entries for place in entry.links}
    assert {f"cache/{name}" for name in listing(run / "cache")} == wanted
    assert len(wanted) == 6
    assert len(listing(run / "dataset" / "media")) == 3
    assert [name for name in listing(run / "dataset") if "/" not in name] == ["0-images.jsonl"]


# Where links can't be made a run's folder gets copies, of its items and of nothing else; they are
# the run's own, so that what is done to them never reaches the store.
def test_copies_where_links_are_refused(here: Path, monkeypatch: Any) -> None:
    media, out = zipped(pictures(here / "media", 3), here / "three.zip"), here / "out"

    def refuse(*_: object, **__: object) -> None:
        raise OSError("links are not supported here")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", refuse)
        context, _ = prepared(out, media)
    before = sums(out / "cache")
    files = [f for d in ("cache", "dataset") for f in (context.run_dir / d).rglob("*")]
    files = [file for file in files if file.is_file() and file.suffix != ".jsonl"]
    assert len(files) == 9
    for file in files:
        assert not file.is_symlink()
        file.write_bytes(b"overwritten")
    assert sums(out / "cache") == before


# Links are made in the order of their names, whatever the order that a folder lists its media in:
# a file system that lists by time of making then lists two runs' items alike.
def test_links_are_made_in_order(here: Path, monkeypatch: Any) -> None:
    media, out = pictures(here / "media", 6), here / "out"
    (media / "p005.png").write_bytes((media / "p000.png").read_bytes())
    made: list[Path] = []
    real = Path.symlink_to

    def watched(self: Path, target: Any, target_is_directory: bool = False) -> None:
        made.append(self)
        real(self, target, target_is_directory)

    monkeypatch.setattr(Path, "symlink_to", watched)
    prepared(out, media)
    latents = [place.name for place in made if place.name.endswith("_hv15.safetensors")]
    texts = [place.name for place in made if place.name.endswith("_te.safetensors")]
    assert len(latents) == len(texts) == 6
    assert latents == sorted(latents)
    assert texts == sorted(texts)


# Equal media with two captions are two items: both are in the run's folder, with one encoding of
# the media between them.
def test_equal_media_are_two_items(here: Path) -> None:
    media, out = pictures(here / "media", 1), here / "out"
    (media / "twin.png").write_bytes((media / "p000.png").read_bytes())
    (media / "twin.txt").write_text("the same, in other words")
    context, _ = prepared(out, zipped(media, here / "twins.zip"))
    assert Counter(line.split()[0] for line in encoded(here / "log")) == {"latents": 1, "text": 2}
    names = listing(context.run_dir / "cache" / "0-images")
    assert [name.split("-")[0] for name in names] == ["p000", "p000", "twin", "twin"]
    assert len(listing(context.run_dir / "dataset" / "media")) == 2
    assert len(in_namespace(out, "media")) == 1


# A row that is given twice is two samples in the run's folder, as its repetition asks, with one
# encoding between them.
def test_a_repeated_row_is_encoded_once(here: Path) -> None:
    media, out = pictures(here / "media", 2), here / "out"
    row = json.dumps({"image_path": str(media / "p000.png"), "caption": "again"})
    other = json.dumps({"image_path": str(media / "p001.png"), "caption": "once"})
    (here / "rows.jsonl").write_text(f"{row}\n{other}\n{row}\n")
    context, _ = prepared(out, here / "rows.jsonl")
    assert sorted(encoded(here / "log")) == sorted(
        f"{what} {caption}" for what in ("latents", "text") for caption in ("again", "once")
    )
    assert len(listing(context.run_dir / "cache" / "0-images")) == 6
    assert len(listing(context.run_dir / "dataset" / "media")) == 3
    assert len((context.run_dir / "dataset" / "0-images.jsonl").read_text().splitlines()) == 3
    assert context.plan.steps_per_epoch == 3


# A crash after hours of encoding loses the item it was at, and no other.
def test_finished_work_outlives_a_crash(here: Path, monkeypatch: Any) -> None:
    media, out = pictures(here / "media", 4), here / "out"
    monkeypatch.setenv("FAKE_FAILS", "3")
    with pytest.raises(StageError, match="the encoder failed as it was asked"):
        prepared(out, media)
    assert len(in_namespace(out, "latents")) == 3
    monkeypatch.setenv("FAKE_FAILS", "-1")
    _, words = prepared(out, media)
    assert "encoded 1/1" in words
    assert len(encoded(here / "log")) == 8
    assert leftovers(out) == []


# While the engine goes on, what it has finished is in the store already: the power may go.
def test_finished_work_is_kept_meanwhile(here: Path, monkeypatch: Any) -> None:
    media, out, gate = pictures(here / "media", 3), here / "out", here / "gate"
    monkeypatch.setenv("FAKE_GATE", str(gate))
    monkeypatch.setattr("runner.pipeline.stages.encoding._COMMIT_SECONDS", 0.0)
    monkeypatch.setattr("runner.pipeline.stages.encoding._UNCHANGED_SECONDS", 0.0)
    early: list[int] = []

    def watch() -> None:
        # The engine waits for the gate after its first item.
        end = time.monotonic() + 120
        while not (early or time.monotonic() > end):
            early.extend([1] * len(in_namespace(out, "latents")))
            time.sleep(0.05)
        gate.touch()

    watching = Thread(target=watch)
    watching.start()
    prepared(out, media)
    watching.join()
    assert early == [1]
    assert len(in_namespace(out, "latents")) == 3
    assert leftovers(out) == []


# So is nothing that it has not: neither a file that was written just now, and may be written once
# more, nor one that is not written to its end.
def test_unfinished_work_is_not_kept_meanwhile(here: Path, monkeypatch: Any) -> None:
    from runner.pipeline.stages import encoding
    from runner.storage.shared_cache import SharedCache

    media, out, over = pictures(here / "media", 3), here / "out", here / "over"
    # The first is whole and old, the second whole and new, the third old and cut, until the first
    # was seen in the store and some time more has gone by.
    writes(
        monkeypatch,
        here,
        f"""
        STORE, OVER = Path({str(out / "cache")!r}), Path({str(over)!r})

        def write(place, data, done):
            place.write_bytes(data[:-7] if done == 2 else data)
            if done != 1:
                os.utime(place, (1, 1))
            if done == 2:
                while not list(STORE.glob("latents/*/*.safetensors")):
                    time.sleep(0.02)
                time.sleep(0.5)
                OVER.touch()
                place.write_bytes(data)
        """,
    )
    monkeypatch.setattr(encoding, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(encoding, "_UNCHANGED_SECONDS", 3600.0)
    kept: list[bool] = []
    real = SharedCache.commit

    def noted(self: SharedCache, namespace: str, *given: Any, **more: Any) -> Path:
        if namespace == "latents":
            kept.append(over.exists())
        return real(self, namespace, *given, **more)

    monkeypatch.setattr(SharedCache, "commit", noted)
    prepared(out, media)
    assert kept == [False, True, True]


# A file that a person changes while it is encoded is not cached under what it was before.
def test_media_that_change_meanwhile_are_not_kept(here: Path, monkeypatch: Any) -> None:
    media, out = pictures(here / "media", 2), here / "out"
    writes(
        monkeypatch,
        here,
        f"""
        def end():
            Path({str(media / "p000.png")!r}).write_bytes(b"x")
        """,
    )
    with pytest.raises(UserError, match=r"p000\.png has changed since it was scanned"):
        prepared(out, media)
    assert len(in_namespace(out, "latents")) <= 1


# What the engine left half-written when it died is no entry.
def test_half_written_files_are_not_kept(here: Path, monkeypatch: Any) -> None:
    media, out = pictures(here / "media", 4), here / "out"
    writes(
        monkeypatch,
        here,
        """
        def write(place, data, done):
            place.write_bytes(data[:-7] if done == 2 else data)
            if done == 2:
                os._exit(9)
        """,
    )
    with pytest.raises(StageError, match="exit code 9"):
        prepared(out, media)
    assert len(in_namespace(out, "latents")) == 2
    monkeypatch.delenv("FAKE_WRITER")
    assert "encoded 2/2" in prepared(out, media)[1]


# A disk that does not give back what was written to it ends the run: it is not filled for ever.
def test_a_disk_that_forgets_ends_the_run(here: Path, monkeypatch: Any) -> None:
    from runner.storage import shared_cache

    media, out = pictures(here / "media", 2), here / "out"
    monkeypatch.setattr(shared_cache, "digest_of", lambda file: os.urandom(32).hex())
    with pytest.raises(StageError, match="could not be read back as it was written"):
        prepared(out, media)


# What is pruned between a run's plan and its links is made again, and the run ends well.
@pytest.mark.parametrize("namespaces", [["latents"], ["media", "text"]])
def test_what_is_pruned_meanwhile_is_made_again(here: Path, namespaces: Sequence[str]) -> None:
    media, out = zipped(pictures(here / "media", 3), here / "three.zip"), here / "out"
    prepared(out, media)
    context = context_of(out, media, *with_musubi(out), console=Console.for_stream(io.StringIO()))
    assert {stage.state for stage in context.plan.stages[1:4]} == {"done"}
    for namespace in namespaces:
        for file in in_namespace(out, namespace):
            file.unlink()
            Path(f"{file}.json").unlink()
    prepare(context)
    assert all(file.exists() for file in (context.run_dir / "cache").rglob("*.safetensors"))
    assert len(listing(context.run_dir / "cache")) == 6


# A run whose data are all cached is ready within a second: for 100 pictures every entry is read
# once, to its last byte, and the work beside that is a million calls of functions, not more.
def test_a_cached_dataset_is_ready_within_a_second(here: Path, monkeypatch: Any) -> None:
    from runner.storage import shared_cache

    media, out = zipped(pictures(here / "media", 100), here / "hundred.zip"), here / "out"
    prepared(out, media)
    silent = Console.for_stream(io.StringIO())
    context = context_of(out, media, *with_musubi(out), console=silent)
    read: list[Path] = []
    digest_of = shared_cache.digest_of

    def noted(file: Path) -> str:
        read.append(file)
        return digest_of(file)

    monkeypatch.setattr(shared_cache, "digest_of", noted)
    # A busy machine takes longer, and does no more.
    calls = 0

    def count(_frame: object, event: str, _what: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        prepare(context)
    finally:
        sys.setprofile(before)
    print(f"100 cached items are ready after {calls:,} calls")
    assert len(encoded(here / "log")) == 200
    assert sorted(read) == sorted(entries(out))
    # Of a machine's slow calls, those of Python, this is about half a second.
    assert calls < 2_000_000
