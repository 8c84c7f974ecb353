"""Datasets of the Hugging Face hub, served on loopback: fetched once, used where they lie."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import compose, run_program, tree
from hub_fetch import Notes, outside
from hub_server import Hub, Repository, serve, talk_to
from media_factory import key_of, make_clip, make_image

from runner.config.schema import RunConfig
from runner.core.errors import StageError, UserError
from runner.data.ingest import ScanOptions, scan_sources
from runner.data.select import Source
from runner.hub import remote
from runner.storage.shared_cache import SharedCache

COMMIT, NEWER = "a" * 40, "b" * 40
NAME = "datasets/some-one/my.set"
TOKEN = "hf_let_me_in_0123456789"


def media(folder: Path) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    make_image(folder / "a.png")
    make_image(folder / "b.jpg", (80, 40))
    make_clip(folder / "c.mp4", 13)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(name="hub")
def dataset_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = media(tmp_path / "made")
    lines = [
        {"file_name": "a.png", "text": " a square "},
        {"file_name": "../clips/c.mp4", "caption": "it moves"},
        {"file_name": "b.jpg", "text": "not this: a .txt lies beside it"},
    ]
    files = {
        "README.md": b"# about",
        ".gitattributes": b"x",
        "pictures/metadata.jsonl": "\n".join(map(json.dumps, lines)).encode(),
        "pictures/a.png": found["a.png"],
        "pictures/b.jpg": found["b.jpg"],
        "pictures/b.txt": "été".encode(),
        "clips/c.mp4": found["c.mp4"],
        "data/train-0.parquet": b"PAR1",
    }
    with serve(Hub({NAME: Repository(files, COMMIT)})) as served:
        talk_to(served, tmp_path, monkeypatch)
        yield served


class _Watch(Notes):
    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None: ...


def config(*overrides: str) -> RunConfig:
    return compose("dataset=hub", "dataset.path=some-one/my.set", *overrides)


def look(tmp_path: Path, *overrides: str, dry: bool = False) -> Source:
    force = "dataset" in config(*overrides).stages.force
    reading = ScanOptions(write=not dry, watch=_Watch, force=force)
    store = SharedCache(tmp_path / "outputs" / "cache")
    (source,) = scan_sources(config(*overrides), tmp_path, store, reading)
    return source


# Media, captions and archives are fetched, into the hub's own cache and nothing else; captions come
# from metadata.jsonl, and from a .txt before that.
def test_a_dataset_is_used_like_a_folder(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    source = look(tmp_path)
    assert [(item.name, item.caption) for item in source.media] == [
        ("clips/c.mp4", "it moves"),
        ("pictures/a.png", "a square"),
        ("pictures/b.jpg", "été"),
    ]
    assert (source.source_kind, source.commit) == ("folder", COMMIT)
    assert source.path == f"some-one/my.set ({COMMIT[:12]})"
    fetched = {asked.path.rpartition("/")[2] for asked in hub.downloads()}
    assert fetched == {"a.png", "b.jpg", "b.txt", "c.mp4", "metadata.jsonl"}
    where = hf_hub_download(
        "some-one/my.set",
        "pictures/a.png",
        repo_type="dataset",
        cache_dir=tmp_path / "hub",
        local_files_only=True,
    )
    assert source.media[1].file == Path(where)
    # Nothing is doubled: the store has notes alone.
    assert not (tmp_path / "outputs" / "cache" / "media").exists()


# What is here is not asked for again, online or off; only a forced stage looks for a newer commit.
def test_what_is_here_needs_no_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = look(tmp_path)
    hub.asked.clear()
    hub.repositories[NAME] = replace(hub.repositories[NAME], commit=NEWER)
    assert look(tmp_path) == first == look(tmp_path, dry=True)
    assert hub.asked == []
    forced = look(tmp_path, "stages.force=[dataset]")
    assert forced.commit == NEWER
    assert hub.downloads() == []  # the same bytes
    assert look(tmp_path, f"dataset.revision={COMMIT}").commit == COMMIT
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert look(tmp_path).commit == NEWER
    with pytest.raises(StageError, match="HF_HUB_OFFLINE is set and the dataset some-one/"):
        look(tmp_path, "dataset.revision=other")
    assert hub.asked == []


# A download that was cut goes on where it ended.
def test_a_cut_download_goes_on(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CHUNK", 100)
    size = len(hub.repositories[NAME].files["clips/c.mp4"])
    hub.cuts["clips/c.mp4"] = [1000]
    look(tmp_path)
    assert hub.sent("c.mp4") == size


# A dry run fetches and writes nothing, and says how much there is to fetch.
def test_a_dry_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"5 files, [\d.]+ kB at commit aaaaaaaaaaaa") as caught:
        look(tmp_path, dry=True)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
    assert hub.downloads() == []


# A repository with one zip and no media is that zip.
def test_a_repository_of_one_zip(hub: Hub, tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in media(tmp_path / "made").items():
            archive.writestr(name, data)
            archive.writestr(Path(name).with_suffix(".txt").name, f"caption of {name}")
    hub.repositories[NAME].files = {"all.zip": packed.getvalue(), "README.md": b""}
    source = look(tmp_path)
    assert source.source_kind == "zip"
    assert [item.caption for item in source.media] == [
        *("caption of a.png", "caption of b.jpg", "caption of c.mp4")
    ]
    store = SharedCache(tmp_path / "outputs" / "cache")
    assert all(store.has("media", key_of(item)) for item in source.media)


# What can't be had or used is reported in one line, before the first byte, and without the token.
def test_refusals(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.repositories[NAME]
    files = dict(repository.files)

    def refused(kind: type[Exception], message: str, *overrides: str) -> None:
        with pytest.raises(kind, match=message) as caught:
            look(tmp_path, *overrides)
        assert "\n" not in str(caught.value) and "hf_" not in str(caught.value)
        assert hub.downloads() == []

    refused(UserError, "needs the name of a dataset", "dataset.path=my.zip")
    refused(StageError, "there is no dataset no/where at", "dataset.path=no/where")
    refused(StageError, "has no branch, tag or commit v9: check dataset", "dataset.revision=v9")
    repository.gated = True
    refused(StageError, r"is gated and no token is set: .*/datasets/some-one/my\.set,")
    monkeypatch.setenv("HF_TOKEN", "hf_not_this_one_0123456789")
    refused(StageError, "the token in use does not open it")
    repository.gated = False
    repository.files = {"data/a.parquet": b"PAR1", "README.md": files["README.md"]}
    refused(UserError, r"inside \.parquet files, which can't be read here: save them")
    repository.files = {f"shard-{number}.tar": b"" for number in range(3)}
    refused(UserError, r"in 3 archives such as shard-0\.tar, of which one can be read: fetch some")
    repository.files = {"README.md": b"", "a.txt": b"x"}
    refused(UserError, "has no picture, clip or archive")


# Lines of metadata.jsonl that name no medium are reported by their number.
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, "needs a file_name"),
        ({"file_name": "none.png", "text": "x"}, "there is no pictures/none.png"),
        ({"file_name": "a.png", "text": 1}, "must be a string"),
    ],
)
def test_wrong_metadata(hub: Hub, tmp_path: Path, line: Any, message: str) -> None:
    hub.repositories[NAME].files["pictures/metadata.jsonl"] = b"\n" + json.dumps(line).encode()
    with pytest.raises(UserError, match=f"metadata.jsonl line 2: .*{message}"):
        look(tmp_path)


# The program itself: fetched with a token that nobody sees, trained on where it lies, the commit
# on record.
def test_a_run_on_a_hub_dataset(hub: Hub, tmp_path: Path) -> None:
    hub.repositories[NAME].gated = True
    hub.repositories[NAME].files["clips/c.txt"] = b"it moves"
    arguments = [
        *("experiment=rehearsal", "dataset=hub", "dataset.path=some-one/my.set"),
        "stages.skip=[weights,latents,text,train]",
    ]
    env = {**outside(hub, tmp_path), "HF_TOKEN": TOKEN}
    refused = run_program(*arguments, cwd=tmp_path, env=env)
    assert refused.code == 2 and "stages.skip=[weights]" in refused.err, refused.err
    assert hub.downloads() == []
    arguments[-1] = "stages.skip=[latents,text,train]"
    done = run_program(*arguments, cwd=tmp_path, env=env)
    assert done.code == 0, done.out + done.err
    assert "6 files to fetch" in done.out
    assert TOKEN not in done.out + done.err
    (folder,) = (tmp_path / "outputs" / "runs").glob("*/*")
    links = sorted((folder / "dataset" / "media").iterdir())
    assert len(links) == 3
    assert all("datasets--some-one--my.set" in str(link.readlink()) for link in links)
    assert COMMIT in (folder / "run.json").read_text() or COMMIT in _tags(tmp_path)
    for file in (tmp_path / "outputs").rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
    dry = run_program(*arguments, "dry_run=true", cwd=tmp_path, env=env)
    assert dry.code == 0 and f"some-one/my.set ({COMMIT[:12]})" in dry.out, dry.err


def _tags(tmp_path: Path) -> str:
    import sqlite3

    with sqlite3.connect(tmp_path / "outputs" / "mlflow.db") as database:
        return str(database.execute("select key, value from tags").fetchall())
