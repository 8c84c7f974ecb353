"""A store that can't be used is explained in one line that leads to the right remedy."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import TOP

from runner.core.errors import UserError
from runner.tracking.client import first_line
from runner.tracking.mlflow_store import initialise, sqlite_path, sqlite_uri


# A store that another version of MLflow made: an older one can be migrated; a newer one can't, and
# MLflow's own advice, to migrate it, would fail.
@pytest.mark.parametrize(
    ("revision", "says"),
    [
        (
            "451aebb31d03",
            "made by an older MLflow; back it up, then run: mlflow db upgrade '",
        ),
        ("ffffffffffff", "made by a newer MLflow than"),
    ],
)
def test_stores_of_other_versions(revision: str, says: str, tmp_path: Path) -> None:
    uri = sqlite_uri(tmp_path)
    # In another process, since MLflow keeps the stores that it opened.
    code = f"from pathlib import Path; initialise({uri!r}, Path({str(tmp_path)!r}))"
    start = "from runner.tracking.mlflow_store import initialise; "
    subprocess.run([sys.executable, "-c", start + code], check=True, cwd=TOP)
    database = sqlite_path(uri)
    assert database is not None
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    with pytest.raises(UserError) as caught:
        initialise(uri, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"cannot open the MLflow store {database}: {says}")
    assert ("upgrade" in message) == ("older" in says)
    assert "\n" not in message


# SQLite's words for a full disk are said plainly; a limit of pages fills the disk here.
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.execute("PRAGMA max_page_count = 2")
        with pytest.raises(sqlite3.OperationalError) as caught:
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    assert first_line(caught.value) == "the disk is full: free some space"
