"""`python -m runner.cache`: it tells what is there, and deletes what was shown and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from cache_process import fake_musubi
from conftest import TOP, run_program, tree
from other_processes import ended, none_left, other, pictures, start, zipped

from runner.cli import cache
from runner.storage.leases import Leases, UseLease
from runner.storage.shared_cache import NAMESPACES, SharedCache
from runner.storage.usage import read_contents

__all__ = ("none_left",)

DAY = 86400.0
DATASETS = {"cats": "/data/cats.zip", "dogs": "/data/dogs"}


@pytest.fixture
def stocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a cache with two datasets that share an entry, and more.

    Of 1000 bytes each: cats has a1 to a4 (used 40 days ago) and shared, dogs d1, d2 (used 2 days
    ago) and shared, nobody u1 (10 days old).
    """
    here = tmp_path / "it's [a] folder"
    here.mkdir()
    monkeypatch.chdir(here)
    for namespace, name in (
        *(("media", "a1.png"), ("latents", "a2.safetensors"), ("latents", "a3.safetensors")),
        *(("text", "a4.safetensors"), ("latents", "shared.safetensors")),
        *(("latents", "d1.safetensors"), ("text", "d2.safetensors")),
    ):
        put(namespace, name, days=50)
    put("text", "u1.safetensors", days=10)
    cats = ["media/a1.png", "latents/a2.safetensors", "latents/a3.safetensors"]
    used("cats", [*cats, "text/a4.safetensors", "latents/shared.safetensors"], days=40)
    dogs = ["latents/d1.safetensors", "text/d2.safetensors", "latents/shared.safetensors"]
    used("dogs", dogs, days=2)
    return here


def put(namespace: str, name: str, *, days: float, size: int = 1000) -> Path:
    """An entry made so many days ago, of so many bytes with its note."""
    made = Path("outputs/made")
    made.parent.mkdir(exist_ok=True)
    made.write_bytes(b"")
    place = SharedCache(Path("outputs/cache")).commit(namespace, name, made, {})
    note = Path(f"{place}.json")
    place.chmod(0o644)
    place.write_bytes(bytes(size - note.stat().st_size))
    place.chmod(0o444)
    return aged(place, days)


def aged(path: Path, days: float) -> Path:
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def used(dataset: str, names: Collection[str], *, days: float, name: str = "") -> None:
    """The record of a run that ended so many days ago; its dataset may have another name."""
    data = {"name": name or dataset, "paths": [DATASETS.get(dataset, dataset)]}
    use = UseLease(Leases(Path("outputs/cache")), f"runs/{dataset}", data)
    use.hold(names)
    use.release()
    for file in Path("outputs/cache/uses").glob("*.json"):
        record = json.loads(file.read_text())
        if record["run"] == use.run:
            record["time"] = time.time() - days * DAY
            file.write_text(json.dumps(record))


def left() -> set[str]:
    """The entries that are there, by the short names they have here."""
    namespaces = (*NAMESPACES, "weights", "looks", "scans")
    files = (
        file for namespace in namespaces for file in Path("outputs/cache", namespace).rglob("*")
    )
    names = {file.name for file in files if file.is_file()}
    assert all(name.removesuffix(".json") in names for name in names)
    return {name.partition(".")[0] for name in names if not name.endswith(".json")}


ALL = {"a1", "a2", "a3", "a4", "shared", "d1", "d2", "u1"}


# The list and the help read as their golden files.
def test_list_and_help_are_golden(
    stocked: Path, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    with pytest.raises(SystemExit) as done:
        cache.main(["--help"])
    assert done.value.code == 0
    golden("cache-help.txt", capsys.readouterr().out)
    before = tree(stocked)
    assert cache.main([]) == 0
    listed = capsys.readouterr().out
    golden("cache-list.txt", listed)
    assert cache.main(["list"]) == 0
    assert capsys.readouterr().out == listed
    assert tree(stocked) == before


# Each option takes what it says and nothing else; together they take what fits all.
@pytest.mark.parametrize(
    ("options", "goes"),
    [
        ("--older-than 30d", {"a1", "a2", "a3", "a4"}),
        ("--older-than 1d", ALL),
        ("--older-than 6w", set()),
        ("--older-than 200h", {"a1", "a2", "a3", "a4", "u1"}),
        ("--dataset cats", {"a1", "a2", "a3", "a4"}),
        ("--dataset /data/dogs", {"d1", "d2"}),
        ("--unused", {"u1"}),
        ("--unused --older-than 11d", set()),
        ("--keep-below 8kB", set()),
        ("--keep-below 7.5kB", {"a2"}),
        ("--keep-below 4kB", {"a1", "a2", "a3", "a4"}),
        ("--keep-below 3kb", {"a1", "a2", "a3", "a4", "u1"}),
        ("--keep-below 0MB", ALL),
        ("--keep-below 1TB", set()),
        ("--dataset dogs --keep-below 0GB", {"d1", "d2"}),
        ("--dataset dogs --older-than 3d", set()),
    ],
)
def test_prune_takes_what_it_says(stocked: Path, options: str, goes: set[str]) -> None:
    assert cache.main(["prune", *options.split(), "--yes"]) == 0
    assert left() == ALL - goes


# It shows what it would delete, and deletes only with a yes: from the option, or from a terminal.
@pytest.mark.parametrize(
    ("terminal", "answer", "options", "goes"),
    [
        (False, "y", [], False),
        (False, "", ["--yes"], True),
        (False, "", ["--yes", "--dry-run"], False),
        (True, "y", [], True),
        (True, " YES ", [], True),
        (True, "", [], False),
        (True, "n", [], False),
        (True, "yeah", [], False),
        (True, None, [], False),
        (True, "y", ["--dry-run"], False),
    ],
)
def test_prune_asks(
    stocked: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal: bool,
    answer: str | None,
    options: list[str],
    goes: bool,
) -> None:
    def asked(question: str) -> str:
        assert question == "delete? [y/N] "
        assert "cats           4" in capsys.readouterr().out
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal, raising=False)
    before = tree(stocked)
    assert cache.main(["prune", "--dataset", "cats", *options]) == 0
    said = capsys.readouterr().out
    assert left() == (ALL - {"a1", "a2", "a3", "a4"} if goes else ALL)
    assert ("Deleted 4 entries (4.0 kB)." in said) == goes
    assert ("Nothing was deleted" in said) == (not goes)
    assert goes or tree(stocked) == before


# What is shown before is what goes, each file named with --verbose.
def test_prune_shows_what_goes(stocked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.main(["prune", "--dataset", "dogs", "--verbose", "--dry-run"])
    said = capsys.readouterr().out
    assert "outputs/cache: 8.0 kB, of which this would be deleted:" in said
    assert "  outputs/cache/latents/d1/d1.safetensors  1.0 kB\n" in said
    assert "  outputs/cache/text/d2/d2.safetensors  1.0 kB\n" in said
    assert "1 entry (1.0 kB) stays: other datasets use them too." in said
    assert "a1" not in said


# What a living process uses or makes is never deleted, whatever is asked; when it has been killed,
# it is.
@pytest.mark.parametrize("what", ["use", "claim"])
def test_a_running_jobs_entries_stay(
    stocked: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["latents/a2.safetensors", "text/u1.safetensors"]
    with other(what, Path("outputs/cache").absolute(), *names) as (process, _):
        assert cache.main([]) == 0
        assert f"in use by runs/other (process {process.pid})" in capsys.readouterr().out
        for options in ("--keep-below 0kB", "--older-than 0h", "--unused", "--dataset cats"):
            assert cache.main(["prune", *options.split(), "--yes"]) == 0
        said = capsys.readouterr().out
        assert left() == {"a2", "u1"}
        assert "2 entries (2.0 kB) stay: in use by runs/other" in said
        assert "2.0 kB would be left, more than 0 bytes." in said
        process.kill()
        process.wait()
    assert cache.main(["prune", "--keep-below", "0kB", "--yes"]) == 0
    assert left() == set()


# Nor does it lose them when another run ends meanwhile that used the very same.
def test_a_running_jobs_entries_outlast_a_run_like_it(stocked: Path) -> None:
    root = Path("outputs/cache").absolute()
    with other("use", root, "latents/a2.safetensors"):
        use = UseLease(Leases(root), "runs/mine", {"name": "d", "paths": ["/d"]})
        use.hold(["latents/a2.safetensors", "weights/tiny-1"])
        use.release()
        assert cache.main(["prune", "--keep-below", "0kB", "--yes"]) == 0
        assert left() == {"a2"}


# A run that begins while a person thinks about the answer keeps its entries.
def test_a_run_that_begins_meanwhile_keeps_its_entries(
    stocked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use = UseLease(Leases(Path("outputs/cache")), "runs/mine", {"name": "cats", "paths": ["/x"]})

    def asked(_: str) -> str:
        use.hold(["latents/a3.safetensors", "media/a1.png"])
        return "y"

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert cache.main(["prune", "--older-than", "30d"]) == 0
    use.release()
    assert left() == {"a1", "a3", "shared", "d1", "d2", "u1"}
    said = capsys.readouterr().out
    assert "Deleted 2 entries (2.0 kB)." in said
    assert "2 entries (2.0 kB) stay: a run has begun to use them." in said


# A real run's entries are found under its dataset's name, in use while it prepares, and a prune at
# that very moment deletes none of them: the run ends well.
def test_a_real_run_and_a_prune_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_musubi(tmp_path / "musubi")
    media = zipped(pictures(tmp_path / "media", 5), tmp_path / "my five.zip")
    outputs, log = tmp_path / "outputs", tmp_path / "log"
    end = tmp_path / "end"
    run = start(outputs, media, log, FAKE_END=str(end))
    said: list[str] = []
    while not list(outputs.glob("runs/*/*/cache/0-images/*_te.safetensors")):
        assert run.poll() is None
        if (outputs / "cache").is_dir():
            assert cache.main(["prune", "--keep-below", "0kB", "--yes"]) == 0
            said.append(capsys.readouterr().out)
        time.sleep(0.05)
    end.touch()
    assert ended(run).count("encoded 5/5") == 2
    assert any("in use by runs/" in text and f"(process {run.pid})" in text for text in said)
    assert len(left()) == 15
    assert cache.main([]) == 0
    listed = capsys.readouterr().out
    assert "\nmy five.zip       15 " in listed
    assert "(unknown)" not in listed
    assert cache.main(["prune", "--dataset", "my five.zip", "--yes"]) == 0
    assert left() == set()


# Shelves that runs say nothing of go by age and by size, never because no run names them; files of
# any kind in odd places stop nothing.
def test_unknown_shelves_go_by_age_and_size(
    stocked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path("outputs/cache")
    for place, days in (("looks/ab/l1.txt", 60), ("looks/cd/l2.txt", 1), ("scans/s1.txt", 45)):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(bytes(100))
        aged(root / place, days)
    (root / "a file").write_text("of no namespace")
    (root / "looks" / "nowhere").symlink_to("gone")
    (root / "media" / "a file").write_text("no folder")
    aged(root / "media" / "a file", 0.0)
    assert cache.main([]) == 0
    listed = capsys.readouterr().out
    assert "  looks  " in listed
    assert "\n(other)          4 " in listed
    assert cache.main(["prune", "--unused", "--yes"]) == 0
    assert {"l1", "l2", "s1"} <= left()
    assert cache.main(["prune", "--older-than", "43d", "--yes"]) == 0
    assert left() >= {"a1", "l2"}
    assert not {"l1", "s1"} & left()
    assert cache.main(["prune", "--keep-below", "0kB", "--yes"]) == 0
    assert left() == set()
    assert (root / "a file").exists()


# What killed processes left half-written is counted and goes; what may be in the making stays.
def test_scraps_go(stocked: Path) -> None:
    root = Path("outputs/cache")
    folder = root / "latents" / "a2"
    old = aged(folder, 0)
    for name, days in ((".a9.7.tmp", 2.0), ("a8.safetensors.json", 2.0), (".a7.7.tmp", 0.0)):
        (old / name).write_bytes(bytes(500))
        aged(old / name, days)
    assert read_contents(root, time.time()).bytes == 9000
    assert cache.main(["prune", "--unused", "--yes"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == [
        ".a7.7.tmp",
        "a2.safetensors",
        "a2.safetensors.json",
    ]


# The tiny model's weights are one thing, which goes whole and belongs to the runs that used it.
def test_weights_go_whole(stocked: Path) -> None:
    for name in ("vae/config.json", "byt5/model.bin"):
        file = Path("outputs/cache/weights/tiny-1", name)
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(1000))
        aged(file, 50)
        aged(file.parent, 50)
    used("cats", ["weights/tiny-1", "media/a1.png"], days=40)
    with other("use", Path("outputs/cache").absolute()):
        assert cache.main(["prune", "--older-than", "30d", "--yes"]) == 0
        assert Path("outputs/cache/weights/tiny-1/byt5/model.bin").exists()
    aged(Path("outputs/cache/weights/tiny-1"), 50)
    assert cache.main(["prune", "--unused", "--yes"]) == 0
    assert Path("outputs/cache/weights/tiny-1/byt5/model.bin").exists()
    assert cache.main(["prune", "--keep-below", "1kB", "--yes"]) == 0
    assert list(Path("outputs/cache/weights").iterdir()) == []


# What is known of downloaded weights is not taken for unused: it saves reading them all again.
def test_checked_weights_are_known_still(stocked: Path) -> None:
    file = Path("outputs/cache/weights/checked/model.json")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    aged(file, 50)
    aged(file.parent, 50)
    for options in ("--unused", "--dataset cats", "--dataset dogs", "--older-than 43d"):
        assert file.exists(), options
        assert cache.main(["prune", *options.split(), "--yes"]) == 0
    assert not file.exists()


# Datasets of one name are distinguished by their paths.
def test_datasets_of_one_name(
    stocked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DATASETS, "/other/cats", "/other/cats.zip")
    used("/other/cats", ["text/u1.safetensors"], days=1, name="cats")
    assert cache.main([]) == 0
    listed = capsys.readouterr().out
    assert "\n/data/cats.zip" in listed
    assert "\n/other/cats.zip" in listed
    monkeypatch.chdir("/")
    relative = os.path.relpath("/other/cats.zip")
    stocked_at = str(stocked / "outputs")
    assert cache.main(["prune", "--dataset", relative, "--yes", "--outputs", stocked_at]) == 0
    monkeypatch.chdir(stocked)
    assert left() == ALL - {"u1"}


# Damaged records of uses lose what they said, and nothing else.
def test_damaged_records_are_passed_over(stocked: Path) -> None:
    for number, words in enumerate(("", "[]", '{"names": 3, "dataset": []}', '{"names": [1]}')):
        Path(f"outputs/cache/uses/bad{number}.json").write_text(words)
    assert cache.main([]) == 0
    assert cache.main(["prune", "--dataset", "dogs", "--yes"]) == 0
    assert left() == ALL - {"d1", "d2"}


WRONG = [
    ("prune", "say what to delete"),
    ("purne --unused", "there is no command 'purne'. Did you mean prune?"),
    ("prune --older-than 30", "'30' needs a unit, such as 30d, 12h or 2w"),
    ("prune --older-than 30x", "'30x' has an unknown unit. There are: d, h, w."),
    ("prune --older-than -3d", "--older-than"),
    ("prune --keep-below 20GX", "'20GX' has an unknown unit. Did you mean GB?"),
    ("prune --keep-below much", "'much' is not a number with a unit, such as 20GB or 500MB"),
    ("prune --keep-below", "expected one argument"),
    ("prune --dataset cast", "nothing in the cache is of it. Did you mean cats?"),
    ("prune --dryrun", "there is no option --dryrun. Did you mean --dry-run?"),
    ("prune --unused extra", "unrecognized arguments: extra"),
    ("--unused", "--unused is for prune: python -m runner.cache prune --unused ..."),
    ("list --yes", "--yes is for prune"),
    ("--outputs nowhere", "there is no cache at nowhere/cache yet"),
    ("prune --unused --outputs nowhere", "there is no cache at nowhere/cache yet"),
]


# Whatever is wrong is one line on standard error and exit code 2, and nothing is touched.
@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[line for line, _ in WRONG])
def test_errors_are_one_line(
    stocked: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    before = tree(stocked)
    try:
        code = cache.main(arguments.split())
    except SystemExit as done:
        code = int(str(done.code))
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert words in said.err
    assert said.err.count("\n") == 1
    assert tree(stocked) == before


# As a program: it needs nothing heavy, and a closed pipe is no failure.
def test_as_a_program(stocked: Path) -> None:
    done = run_program("prune", "--older-than", "30d", cwd=stocked, module="runner.cache")
    assert (done.code, done.err) == (0, "")
    assert "no terminal to ask at; --yes deletes without asking." in done.out
    assert left() == ALL
    code = (
        "import sys; from runner import cache; cache.main([]);"
        "print({'torch', 'mlflow', 'hydra', 'numpy', 'rich'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(TOP)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert process.stdout.endswith("set()\n"), process
    piped = f"{sys.executable} -m runner.cache | head -c 1"
    process = subprocess.run(["sh", "-c", piped], capture_output=True, text=True, env=env)
    assert process.stderr == ""


# Media that another run takes in at the moment, and what is known of the hub's datasets, stay.
def test_what_is_on_its_way_in_stays(stocked: Path) -> None:
    incoming = put("incoming", "media-1", days=99)
    known = put("hub", "commit", days=99)
    assert cache.main(["prune", "--older-than", "1d", "--yes"]) == 0
    assert incoming.exists() and known.exists()
