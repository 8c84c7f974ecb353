"""The image's files, read; building and running them is scripts/check-docker's work."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compose_file import FILE, ROOT, compose_file, entrypoint

DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
RUNNING = ("train", "test", "shell")


def services(**environment: str) -> dict[str, Any]:
    found: dict[str, Any] = compose_file(environment)["services"]
    return found


# The services that were promised, and what `up` starts: the tracking server alone.
def test_services_are_the_promised_ones() -> None:
    assert set(services()) == {*RUNNING, "mlflow", "postgres"}
    assert {name for name, one in services().items() if not one.get("profiles")} == {
        "mlflow",
        "postgres",
    }


# Nothing can be reached from another machine unless someone says so.
def test_ports_are_of_this_machine_alone() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:5000:5000"]
    assert not any("network_mode" in service for service in services().values())


# A secret is in no file of the repository: each is empty unless the environment has it.
def test_no_secret_has_a_default() -> None:
    for name, service in services().items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET", key):
                assert value in (None, ""), f"{name}: {key}"
    given = services(POSTGRES_PASSWORD="from outside")
    assert given["mlflow"]["environment"]["POSTGRES_PASSWORD"] == "from outside"
    assert given["postgres"]["environment"]["POSTGRES_PASSWORD"] == "from outside"


# The image holds no secret and no package index, and is not root's: pip's configuration comes in
# as a secret of the build.
def test_image_has_no_secret_and_no_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    for target in ("mlflow", "runner"):
        (stage,) = [one for one in stages if one.splitlines()[0].endswith(f" AS {target}")]
        users = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        assert users == ["1000:1000"]
    for line in re.findall(r"^(?:ARG|ENV|COPY|ADD) .*", DOCKERFILE, re.MULTILINE):
        assert not re.search(r"PASSWORD|TOKEN|SECRET|INDEX|PIP_|\.env", line), line
    assert "://" not in DOCKERFILE
    for step in re.findall(r"^RUN (?:.*\\\n)*.*", DOCKERFILE, re.MULTILINE):
        if re.search(r"bin/pip |musubi_install", step):
            assert "--mount=type=secret,id=pip" in step, step


# What is not needed for the image never goes to the build: data, weights, runs, passwords.
def test_build_context_is_a_list_of_what_may_go() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").split()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*((?:.*\\\n)*.*)", DOCKERFILE, re.MULTILINE)
    wanted = {
        part for line in copied for part in line.replace("\\\n", " ").split() if part[0] != "/"
    }
    assert {name.partition("/")[0] for name in wanted} <= {
        name.partition("/")[0] for name in allowed
    }
    for name in wanted:
        assert (ROOT / name).exists()
        assert any(name == one or name.startswith(f"{one}/") for one in allowed), name


# A run that is asked to end has longer than the runner waits for its trainer, twice over.
def test_stopping_leaves_time_to_end() -> None:
    from runner.core.process import GRACE_SECONDS

    for name, service in services().items():
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace >= (3 * GRACE_SECONDS if name in RUNNING else 30), name
        assert service.get("init") or name == "postgres"


# The old folders are the container's, and what is written there is the calling user's.
@pytest.mark.parametrize("name", RUNNING)
def test_folders_and_user(name: str) -> None:
    service = services(RUNNER_UID="1234", RUNNER_GID="99")[name]
    assert service["user"] == "1234:99"
    mounted = {volume["source"]: volume for volume in service["volumes"]}
    assert {source: volume["target"] for source, volume in mounted.items()} == {
        "../data": "/workspace/data",
        "../models": "/workspace/models",
        "../output": "/workspace/outputs",
    }
    # Docker would make a missing one as root's.
    assert all(volume["bind"] == {"create_host_path": False} for volume in mounted.values())
    assert "WORKDIR /workspace\n" in DOCKERFILE and "HF_HOME=/workspace/models" in DOCKERFILE
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


# A server that does not answer is seen to be ill, and MLflow waits for its database.
def test_servers_have_health_checks() -> None:
    assert services()["mlflow"]["healthcheck"]["test"][0] == "CMD"
    assert services()["postgres"]["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]
    assert services()["mlflow"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


# `docker compose run SERVICE overrides` reaches the runner: the command composes as it stands.
@pytest.mark.parametrize("name", ["train", "test"])
def test_commands_compose(name: str, tmp_path: Path) -> None:
    command = entrypoint(services()[name], DOCKERFILE)
    assert command[:3] == ["python", "-m", "runner"]
    overrides = ["task=i2v", "optimizer=adafactor", "dataset.path=data/mydata.zip"]
    done = subprocess.run(
        [sys.executable, *command[1:], *overrides, "--cfg", "job"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "path: data/mydata.zip" in done.stdout
    assert ("  epochs: 1\n" in done.stdout) == (name == "test")


# A change of our code must not install musubi-tuner again: its layer is made of these files alone.
def test_musubi_layer_has_what_it_imports_and_no_more() -> None:
    stage = DOCKERFILE.partition(" AS musubi\n")[2].partition("\nFROM ")[0]
    copied = set(re.findall(r"runner/[\w/]+\.(?:py|json)", stage.partition("\nRUN ")[0]))
    code = (
        "import sys, json, runner.core.process, runner.engines.musubi_install\n"
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n[:6] == 'runner']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {str(Path(file).relative_to(ROOT)) for file in json.loads(done.stdout)}
    source = (ROOT / "runner" / "engines" / "musubi" / "install.py").read_text("utf-8")
    probes = {
        f"runner/engines/musubi/probes/{name}.py"
        for name in re.findall(r'program\("(\w+)"\)', source)
    }
    assert probes
    assert copied == imported | probes | {"runner/formats/trainer_options.json"}


# The tracking server refuses to start without its secrets, in one line that names the missing one.
@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, "MLFLOW_AUTH_ADMIN_PASSWORD is not set"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "short"}, "12 characters"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "x" * 12}, "MLFLOW_FLASK_SERVER_SECRET_KEY is not set"),
        (
            {"MLFLOW_AUTH_ADMIN_PASSWORD": "x" * 12, "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"},
            "POSTGRES_PASSWORD is not set",
        ),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD_FILE": "/nowhere"}, "/nowhere can't be read"),
    ],
)
def test_server_needs_its_secrets(environment: dict[str, str], named: str, tmp_path: Path) -> None:
    done = server(environment, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr
    assert not list(tmp_path.iterdir())


# Secrets may come from files, reach the server by its environment, and are in no argument.
def test_server_hands_secrets_over_unseen(tmp_path: Path) -> None:
    secret = "a b%c'd\"e$(f)@:/"
    for name in ("admin", "key", "postgres"):
        (tmp_path / name).write_text(f"{secret}{name}\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    fake = tools / "mlflow"
    fake.write_text('#!/bin/sh\necho "arguments $*"\nenv\ncat "$MLFLOW_AUTH_CONFIG_PATH"\n')
    fake.chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "MLFLOW_AUTH_ADMIN_PASSWORD_FILE": str(tmp_path / "admin"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY_FILE": str(tmp_path / "key"),
        "POSTGRES_PASSWORD_FILE": str(tmp_path / "postgres"),
    }
    done = server(environment, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"MLFLOW_AUTH_ADMIN_PASSWORD={secret}admin" in lines
    assert f"MLFLOW_FLASK_SERVER_SECRET_KEY={secret}key" in lines
    assert f"PGPASSWORD={secret}postgres" in lines
    assert "--app-name basic-auth" in lines[0] and "--host 127.0.0.1" in lines[0]
    (config,) = tmp_path.glob("mlflow-auth.*")
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert secret not in lines[0] + config.read_text()


# An older store is brought up to date on request alone, and an unknown argument starts nothing.
def test_server_upgrades_when_asked(tmp_path: Path) -> None:
    fake = tmp_path / "mlflow"
    fake.write_text('#!/bin/sh\necho "$*"\n')
    fake.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "x" * 12,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "k",
        "POSTGRES_PASSWORD": "p",
    }
    assert server(environment, tmp_path, "--upgrade").stdout == (
        "db upgrade postgresql+psycopg2://\n"
    )
    assert server(environment, tmp_path, "--host=0.0.0.0").returncode == 2


def server(
    environment: dict[str, str], folder: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "docker" / "mlflow-server", *arguments],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# docker/prepare makes the folders and passwords of its own, readable by the caller alone, once.
def test_prepare_makes_passwords_once(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    script = tmp_path / "docker" / "prepare"
    script.write_bytes((ROOT / "docker" / "prepare").read_bytes())
    script.chmod(0o755)
    subprocess.run([script], check=True, capture_output=True)
    file = tmp_path / "docker" / ".env"
    made = file.read_text()
    values = dict(line.split("=") for line in made.splitlines() if line[0] != "#")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert values["RUNNER_UID"] == str(os.getuid())
    secrets = {values[name] for name in values if re.search("ADMIN_PASSWORD|SECRET|POSTGRES", name)}
    assert len(secrets) == 3 and all(len(secret) == 48 for secret in secrets)
    assert {name for name in ("data", "models", "output") if (tmp_path / name).is_dir()} == {
        "data",
        "models",
        "output",
    }
    asked = set(re.findall(r"\$\{(\w+)", FILE.read_text("utf-8")))
    assert set(values) <= asked
    subprocess.run([script], check=True, capture_output=True)
    assert file.read_text() == made
