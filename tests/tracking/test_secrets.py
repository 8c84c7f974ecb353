from __future__ import annotations

import json
import shlex
import time
from urllib.parse import quote

import pytest
import yaml
from hydra._internal.grammar.utils import escape_special_characters
from hydra.core.override_parser.types import Quote, QuotedString

from runner.tracking.secrets import redact, redact_mapping, secret_values

HUB_TOKEN = "hf_" + "aB3dE6gH9" * 4


# Nothing that is a secret by its form or by the name it is assigned to survives.
@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"downloading with {HUB_TOKEN}.", HUB_TOKEN),
        ("https://ann:pa55@word@host:5000/mlflow", "pa55@word"),
        ("postgresql+psycopg://mlflow:geheim@db/mlflow", "geheim"),
        ("postgresql://u:pa/ss@host/db", "pa/ss"),
        ("mysql://u:12345/a@b'c@host/db", "12345/a@b'c"),
        ("logged in with hf_oauth_eyJhbGci.eyJz_dWI-9", "eyJhbGci.eyJz_dWI-9"),
        ("hf_jwt_eyJhbGciOiJFZERTQSJ9", "eyJhbGciOiJFZERTQSJ9"),
        ("the password: geheim12 of ann", "geheim12"),
        ("the password: geheim", "geheim"),
        (r"tracking.uri=http\://ann\:geh\ eim@host", r"geh\ eim"),
        (r"['tracking.uri=http\\://ann\\:geheim@host']", "geheim"),
        ("hub:\n  token: my own words\n  path: x", "my own words"),
        ("HF_TOKEN=abcd1234 python -m runner", "abcd1234"),
        ("runner --hub-token abcd1234 task=i2v", "abcd1234"),
        ('{"db_password": "a \\"b\\" c", "x": 1}', 'a \\"b\\" c'),
        ("tracking.password='x y'", "x y"),
        ("GET /x?access_token=abcd1234&n=1", "abcd1234"),
        ("Authorization: Bearer abcdefgh12345678", "abcdefgh12345678"),
    ],
)
def test_secrets_are_hidden(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert "***" in redact(text)


# Redacting changes nothing else: captions, paths, options and unset tokens stay as they are.
@pytest.mark.parametrize(
    "text",
    [
        "a token of love, the secret garden",
        "basic training of a bearer",
        "a film, the secret: a garden",
        "http://localhost:5000/#/x@y",
        "max_token_length: 256\ntokenizer: Qwen/Qwen-Image\nnum_tokens=77",
        "hub:\n  token: null\n  path: /data/hf_models/x",
        "token: ${oc.env:HF_TOKEN}",
        "http://localhost:5000/#/experiments/1",
        "sqlite:////home/ann/a:b@c/mlflow.db",
        "",
    ],
)
def test_other_text_is_kept(text: str) -> None:
    assert redact(text) == text


# A long run without spaces, as a log may hold, costs no more than its length: milliseconds, where
# the square of it would be minutes.
@pytest.mark.parametrize("part", ["a.", "-", "--a", "://a:b/", "x://a@b:c/", "token:${", "_token"])
def test_long_runs_are_redacted_quickly(part: str) -> None:
    # The work of this thread alone: a busy machine takes longer, and works no more.
    began = time.thread_time()
    redact(part * (80_000 // len(part)))
    assert time.thread_time() - began < 2


# Hiding a value keeps JSON readable, so config files stay usable.
def test_redacted_json_is_json() -> None:
    assert json.loads(redact('{"token": "abc", "rank": 8}')) == {"token": "***", "rank": 8}


# Values of the secret variables are hidden wherever they occur; short ones as whole words only.
def test_values_of_the_environment_are_hidden() -> None:
    secrets = secret_values({"HF_TOKEN": "plainlookingvalue", "MLFLOW_TRACKING_PASSWORD": "abc"})
    assert redact("x/plainlookingvalue/y", secrets) == "x/***/y"
    assert redact("abc abcd", secrets) == "*** abcd"


# The password of an address in any variable is hidden in each form in which a program may write it;
# a short one, which may be a word of the text, in addresses alone.
def test_passwords_of_addresses_are_hidden_in_every_form() -> None:
    password = r"""p:a/s@s,w'o"r\d (x)[y]é"""
    secrets = secret_values({"HTTP_PROXY": f"http://ann:{password}@proxy:1", "A": "http://h:80/@"})
    for text in (
        *(password, quote(password, safe=""), shlex.quote(password), repr(password)),
        *(json.dumps(password), json.dumps(password, ensure_ascii=False)),
        escape_special_characters(password),
        *(QuotedString(password, mark).with_quotes() for mark in Quote),
        yaml.safe_dump(password, allow_unicode=True),
    ):
        assert "a/s" in text or "a%2Fs" in text
        assert "***" in redact(text, secrets) and "w" not in redact(text, secrets), text
    short = secret_values({"RUNNER_PASSWORD_1": "mlflow"})
    assert redact("mlflow.db of mlflow:mlflow", short) == "mlflow.db of mlflow:mlflow"


# What stands for a password that was moved to a variable is no secret.
def test_references_are_kept() -> None:
    text = "http://ann:${oc.env:RUNNER_PASSWORD_1}@host"
    assert redact(text) == text


# Mappings are redacted at every depth and keep the types of what is no secret.
def test_mappings_are_redacted_in_depth() -> None:
    config = {
        "hub": {"token": "abc", "retries": 3},
        "args": ["--password x", 1.5],
        "network": {"rank": 8, "alpha": None, "on": True},
        "password": 1234,
    }
    assert redact_mapping(config) == {
        "hub": {"token": "***", "retries": 3},
        "args": ["--password ***", 1.5],
        "network": {"rank": 8, "alpha": None, "on": True},
        "password": "***",
    }


# One secret may be the beginning, the middle or the end of another: nothing of either is left.
@pytest.mark.parametrize("longer", ["{}-and-more", "more-{}", "more-{}-and-more"])
def test_a_secret_inside_another_leaves_nothing(longer: str) -> None:
    short = "plainlookingvalue"
    long = longer.format(short)
    for values in ((short, long), (long, short)):
        environment = dict(zip(("HF_TOKEN", "MLFLOW_TRACKING_TOKEN"), values, strict=True))
        assert redact(f"x {long} {short} y", secret_values(environment)) == "x *** *** y"
