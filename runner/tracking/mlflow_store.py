"""The MLflow store: a SQLite file in the output folder, or a server."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from runner.core.errors import UserError, plain_reason
from runner.tracking.client import connect, first_line, quiet, without_secrets
from runner.tracking.server import check_server, describe_failure

DATABASE_NAME = "mlflow.db"
ARTIFACTS_NAME = "mlartifacts"

_SQLITE_MAGIC = b"SQLite format 3\0"


def sqlite_uri(outputs: Path) -> str:
    """Return ``sqlite:////abs/outputs/mlflow.db``, escaped for any characters in the path.

    Raises:
        UserError: the installed SQLAlchemy can't open such a path.
    """
    return _file_uri(outputs.resolve() / DATABASE_NAME)


def _file_uri(database: Path) -> str:
    path = str(database)
    if "%" not in path and "?" not in path:
        return f"sqlite:///{path}"
    if tuple(int(part) for part in version("sqlalchemy").split(".")[:2]) < (2, 1):
        # Before 2.1 SQLAlchemy did not unescape the path, and cut it at a question mark.
        if "?" in path:
            raise UserError(f"{path}: the path must not contain `?`; choose another for outputs")
        return f"sqlite:///{path}"
    # With the driver's name, MLflow does not create a folder of the escaped name by mistake.
    return "sqlite+pysqlite:///" + path.replace("%", "%25").replace("?", "%3F")


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a SQLite ``uri``; None for another store. Imports SQLAlchemy.

    Raises:
        UserError: the path is not absolute.
    """
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        database = make_url(uri).database
    except ArgumentError:
        database = None
    if not database or not Path(database).is_absolute():
        raise UserError(
            f"tracking.uri={without_secrets(uri)}: give an absolute path, sqlite:////folder/mlflow.db"
        )
    return Path(database)


def artifact_root(outputs: Path) -> Path:
    """Return the absolute folder of the artifacts of a store in ``outputs``."""
    return outputs.resolve() / ARTIFACTS_NAME


def initialise(uri: str, outputs: Path) -> None:
    """Prepare the store at ``uri``; any number of processes may do so at once.

    ``outputs`` is created. A SQLite file is created and migrated under a file lock, and appears
    only when it is complete. A server is asked whether it answers.

    Raises:
        UserError: the store can't be used.
    """
    if uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "uc")):
        raise UserError(
            f"tracking.uri={without_secrets(uri)}: MLflow no longer writes to plain "
            "folders; leave it out for SQLite, or give http://host:port of a server"
        )
    try:
        outputs.mkdir(parents=True, exist_ok=True)
        database = sqlite_path(uri)
        if database is not None:
            database.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the folder {error.filename or outputs}: {error.strerror}"
        ) from error
    if database is not None:
        _initialise_sqlite(uri, database, artifact_root(outputs))
        return
    check_server(uri)


def _initialise_sqlite(uri: str, database: Path, artifacts: Path) -> None:
    from filelock import FileLock

    try:
        with FileLock(f"{database}.lock"):
            fresh = not database.exists() or database.stat().st_size == 0
            if fresh:
                _create_sqlite(database, artifacts)
            elif not os.access(database, os.W_OK):
                raise UserError(f"{database} is not writable; change its mode or `outputs`")
            else:
                with database.open("rb") as file:
                    if file.read(len(_SQLITE_MAGIC)) != _SQLITE_MAGIC:
                        raise UserError(f"{database} is not a SQLite file; move it away")
            connect(uri).search_experiments(max_results=1)
    except UserError:
        raise
    except OSError as error:
        reason = plain_reason(error.strerror or str(error))
        raise UserError(f"cannot create {database}: {reason}") from error
    except Exception as error:
        message = first_line(error)
        if "out-of-date database schema" in message:
            message = _other_schema(uri, database)
        raise UserError(f"cannot open the MLflow store {database}: {message}") from error


def _other_schema(uri: str, database: Path) -> str:
    """Say what to do about a store whose tables are of an older or newer MLflow."""
    import sqlite3

    from mlflow.store import db_migrations

    # Each migration is a file named by its revision; a newer MLflow's revision has no file here.
    with closing(sqlite3.connect(database)) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    folder = Path(db_migrations.__path__[0]) / "versions"
    if any(folder.glob(f"{revision}_*.py")):
        return f"made by an older MLflow; back it up, then run: mlflow db upgrade '{uri}'"
    return (
        f"made by a newer MLflow than {version('mlflow')}, which is installed here: install that "
        "one, or take another store with output_dir or tracking.uri"
    )


def _create_sqlite(database: Path, artifacts: Path) -> None:
    """Migrate an empty file under another name, then move it into place; takes seconds."""
    quiet()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="mlflow-", dir=database.parent) as folder:
        new = Path(folder) / DATABASE_NAME
        store = SqlAlchemyStore(_file_uri(new), artifacts.as_uri())
        store.engine.dispose()
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(database)


def ensure_experiment(uri: str, name: str, artifact_root: Path | None) -> str:
    """Return the id of an experiment, creating it if it is missing; safe against races.

    Args:
        uri: the address of the store.
        name: the experiment's name.
        artifact_root: the folder of a new experiment's artifacts; None lets the server decide.

    Raises:
        UserError: MLflow refuses the name, or the experiment was deleted.
    """
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    location = None if artifact_root is None else artifact_root.as_uri()
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)
    except Exception as error:
        if uri.startswith(("http://", "https://")):
            description = f"tracking server {without_secrets(uri)} {describe_failure(uri, error)}"
            raise UserError(f"tracking.experiment={name}: {description}") from error
        raise UserError(f"tracking.experiment={name}: {first_line(error)}") from error
    if experiment is None or experiment.lifecycle_stage != "active":
        raise UserError(
            f"tracking.experiment={name} was deleted in MLflow; restore it there or choose "
            "another name"
        )
    return str(experiment.experiment_id)
