"""A ready MLflow store for tests: migrated once (seconds), copied for each test (milliseconds)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.tracking import mlflow_store
from runner.tracking.client import connect


@dataclass(frozen=True)
class Store:
    uri: str
    outputs: Path

    @property
    def client(self) -> Any:
        return connect(self.uri)

    def points(self, run_id: str, key: str) -> dict[int, float]:
        """Step to value of one metric; fails if a step is stored twice."""
        history = self.client.get_metric_history(run_id, key)
        values = {metric.step: metric.value for metric in history}
        assert len(values) == len(history), f"{key} has a step twice"
        return values


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("migrated")
    mlflow_store.initialise(mlflow_store.sqlite_uri(outputs), outputs)
    return outputs / mlflow_store.DATABASE_NAME


@pytest.fixture
def store(migrated: Path, tmp_path: Path) -> Iterator[Store]:
    outputs = tmp_path / "out [é] puts"
    outputs.mkdir()
    shutil.copy(migrated, outputs)
    yield Store(mlflow_store.sqlite_uri(outputs), outputs)
