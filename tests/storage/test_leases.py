"""Claims and uses: each holds as long as its process lives, and no longer."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from other_processes import other

from runner.storage.leases import Leases, UseLease


# An entry has one maker: what another process claims is not given, what it does not claim is.
def test_claims_are_on_entries(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    with other("claim", leases.root, "text/a", "text/b") as (process, said):
        assert said == "text/a text/b"
        with leases.lease_for_making({"text/b", "text/c"}, "runs/mine") as (mine, claims):
            assert mine == {"text/c"}
            (claim,) = claims
            assert claim.holder == f"runs/other (process {process.pid})"
            assert claim.names == {"text/a", "text/b"}
        with leases.lease_for_making({"latents/x"}, "runs/mine") as (mine, claims):
            assert (set(mine), claims) == ({"latents/x"}, ())


# A killed process claims nothing any more, and its files go when the next one claims.
def test_a_dead_process_claims_nothing(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    with other("claim", leases.root, "text/a") as (process, _):
        with leases.lease_for_making({"text/a"}, "runs/mine") as (mine, claims):
            assert not mine
        process.kill()
        process.wait()
        leases.wait(claims)
        assert len(list((leases.root / "claims").iterdir())) == 2
        with leases.lease_for_making({"text/a"}, "runs/mine") as (mine, _claims):
            assert mine == {"text/a"}
    assert list((leases.root / "claims").iterdir()) == []


# Claims end with their block, whether it ends well or not.
def test_claims_end(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    for error in (None, RuntimeError("failed")):
        try:
            with leases.lease_for_making({"text/a"}, "runs/mine") as (mine, _):
                assert mine == {"text/a"}
                if error:
                    raise error
        except RuntimeError:
            pass
        with leases.lease_for_making({"text/a"}, "runs/mine") as (mine, claims):
            assert (set(mine), claims) == ({"text/a"}, ())
    assert list((leases.root / "claims").iterdir()) == []


# Thousands of entries are claimed with one open file, not one each.
def test_many_entries_take_one_lock(tmp_path: Path) -> None:
    import psutil

    leases = Leases(tmp_path / "cache")
    names = {f"latents/{number:040x}.safetensors" for number in range(20_000)}
    before = psutil.Process().num_fds()
    with leases.lease_for_making(names, "runs/mine") as (mine, _):
        assert mine == names
        assert psutil.Process().num_fds() == before + 1


# Words that a crash or a power cut left half-written, and foreign files, stop nobody.
def test_scraps_are_swept(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    for folder in ("claims", "uses"):
        (leases.root / folder).mkdir(parents=True)
        for name, words in (
            ("cut.json", '{"names": ["text/a'),
            ("cut.lock", ""),
            ("list.json", "[1]"),
            ("odd.json", '{"names": 7}'),
            ("lone.lock", ""),
            (".x.json.7.tmp", "{"),
        ):
            (leases.root / folder / name).write_text(words)
    with leases.lease_for_making({"text/a"}, "runs/mine") as (mine, _):
        assert mine == {"text/a"}
        assert leases.leased_keys() == {"text/a"}
    assert list((leases.root / "claims").iterdir()) == []
    use = UseLease(leases, "runs/mine", {"name": "d", "paths": ["/d"]})
    use.hold(["text/a"])
    use.release()
    assert {file.suffix for file in (leases.root / "uses").iterdir()} == {".json"}


# What a run uses is in use until its process has ended, however that ends; its record stays.
def test_uses_hold_while_their_process_lives(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    with other("use", leases.root, "text/a") as (process, said):
        assert said == "held"
        assert leases.leased_keys() == {"text/a", "weights/tiny-1"}
        process.kill()
        process.wait()
        assert leases.leased_keys() == frozenset()
        (record,) = leases.using.all()
        assert record.names == {"text/a", "weights/tiny-1"}
        assert record.data["dataset"] == {"name": "d", "paths": ["/d"]}


# A use is rewritten as the run finds out what it needs, and is one record to the end.
def test_a_use_follows_its_run(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    use = UseLease(leases, "runs/mine", {"name": "d", "paths": ["/d"]})
    use.hold(["text/a"])
    use.hold(["text/b", "text/c"])
    assert leases.leased_keys() == {"text/b", "text/c"}
    use.release()
    assert leases.leased_keys() == frozenset()
    (file,) = (leases.root / "uses").iterdir()
    assert json.loads(file.read_text())["names"] == ["text/b", "text/c"]


# A thousand runs of a sweep on the same entries leave one record; runs on other entries, or on
# another dataset, keep theirs.
def test_records_do_not_pile_up(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    for number in range(10):
        for path, names in (("/a", ["text/a"]), ("/a", ["text/b"]), ("/b", ["text/a"])):
            use = UseLease(leases, f"runs/{number}{path}{names}", {"name": "d", "paths": [path]})
            use.hold(names)
            use.release()
    assert len(list((leases.root / "uses").iterdir())) == 3
    assert {record.data["run"][:6] for record in leases.using.all()} == {"runs/9"}


# Who wants one name takes turns: it is waited for, which is said once, and a dead holder has none.
def test_turns_on_one_name(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    waited: list[str] = []
    with other("claim", leases.root, "incoming/x") as (process, _):
        with leases.turn("incoming/y", "mine", lambda: waited.append("y")):
            assert leases.names_being_made() == {"incoming/x", "incoming/y"}
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        with leases.turn("incoming/x", "mine", lambda: waited.append("x")):
            assert waited == ["x"]
            assert leases.names_being_made() == {"incoming/x"}
    assert list((leases.root / "claims").iterdir()) == []


# A run that ends takes the records of ended runs like it away, and never that of a run that goes
# on, though it is on the same dataset and uses the same.
def test_the_record_of_a_running_run_stays(tmp_path: Path) -> None:
    leases = Leases(tmp_path / "cache")
    names = ["text/a", "weights/tiny-1"]
    with other("use", leases.root, "text/a") as (process, said):
        assert said == "held"
        for number in range(2):
            use = UseLease(leases, f"runs/mine{number}", {"name": "d", "paths": ["/d"]})
            use.hold(names)
            use.release()
        records = {record.data["run"]: record for record in leases.using.all()}
        assert records.keys() == {"runs/other", "runs/mine1"}
        # They are alike indeed, so that only its life keeps the first.
        assert len({record.data["set"] for record in records.values()}) == 1
        assert records["runs/other"].holder == f"runs/other (process {process.pid})"
        assert leases.leased_keys() == set(names)
