"""Redaction of tokens and passwords. Pure: secret values are passed in."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Mapping
from urllib.parse import quote, unquote

HIDDEN = "***"

SECRET_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
# Variables with this name and a number hold the passwords of runner.tracking.passwords.
PASSWORD_VARIABLE = "RUNNER_PASSWORD_"
# A shorter password of an address may also be an ordinary word, as in mlflow:mlflow@host/mlflow: it
# is hidden in addresses only.
_LONG = 8

# A key whose last word is one of these holds a secret: `hub.token`, `HF_TOKEN`, `db-password`.
# `max_token_length` and `tokenizer` do not.
_KEY = r"(?:[\w.\-]*[_.\-])?(?:token|password|passwd|secret|api_?key|secret_?key|access_?key)"
_SECRET_KEY = re.compile(rf"{_KEY}\Z", re.IGNORECASE)
_NOTHING = r"(?:null|none|true|false|~|\"\"|''|\$\{[^}\n]{0,200}\}|\*\*\*)(?=[\s,;&}\])]|\Z)"
_ASSIGNED = re.compile(
    # Both begin at the start of a word: tried everywhere, a long word would take quadratic time.
    rf"(?P<before>(?<![\w.\-])(?:{_KEY}[\"']?[ \t]*[:=][ \t]*|--{_KEY}[ \t]+))(?!{_NOTHING})"
    r"(?:(?P<double>\")(?:[^\"\\\n]|\\.)*\"|(?P<single>')[^'\n]*'|[^\s,;&\"'}\])]+)",
    re.IGNORECASE,
)
# A plain YAML value may have spaces and goes to the end of its line.
_YAML_LINE = re.compile(
    rf"^(?P<before>[ \t]*(?:- )?{_KEY}:[ \t]+)(?!{_NOTHING}|[\"'])[^\n\r]+",
    re.IGNORECASE | re.MULTILINE,
)
# The start of a URI's password. In an http address, a number after the host and before a slash is a
# port. Hydra puts a backslash before colons and spaces, and Python doubles that.
_PASSWORD_START = re.compile(
    r"(?:(?<=https)|(?<=http))\\*://[^\s/:@]*:(?!\d{1,5}[/?#])"
    r"|(?<=[\w+.\-])(?<!http)(?<!https)\\*://[^\s/:@]*:"
)
_WORD = re.compile(r"(?:\\[ \t]|[^\s\"<>])+")
_VARIABLE = re.compile(rf"\$\{{oc\.env:{PASSWORD_VARIABLE}\d+\}}")
_ADDRESS = re.compile(r"[A-Za-z][\w+.\-]*://")
_BEARER = re.compile(r"(?P<before>\b(?:Bearer|Authorization: *Basic) +)[A-Za-z0-9._~+/\-]{8,}=*")
HUB_TOKEN = re.compile(
    r"\b(?:hf_(?:oauth|jwt)_[\w.\-]{7,}[\w\-]|hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,})"
)
# A caption such as "the secret: a garden" is no secret: an article comes before the word, and a
# short word and another one after it.
_ARTICLE = re.compile(r"\b(?:the|a|an|this|that|his|her|its|their|my|our|your) \Z", re.IGNORECASE)
_SENTENCE = re.compile(r"(?:token|password|secret): [a-z]{1,6} [a-z]+\b", re.IGNORECASE)


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Collect the secrets of the environment, longest first.

    Args:
        environment: variables with their values.

    Returns:
        The values of ``SECRET_VARIABLES`` that are set, and the passwords of addresses in any
        variable, such as a proxy's; each also as Hydra, a shell, JSON, YAML and a URI write it.
    """
    values = {environment.get(name, "").strip() for name in SECRET_VARIABLES}
    for name, value in environment.items():
        span = password_span(value)
        password = value if name.startswith(PASSWORD_VARIABLE) else value[slice(*span or (0, 0))]
        if len(password) >= _LONG:
            values.add(password)
    forms = {form for value in values for form in _forms(value)}
    return tuple(sorted(forms - {""}, key=lambda form: (-len(form), form)))


def password_span(value: str) -> tuple[int, int] | None:
    """Find the start and end of the password, of any characters, in an address, if there is one."""
    end = value.rfind("@")
    if end < 0 or not _ADDRESS.match(value):
        return None
    start = _PASSWORD_START.search(value, 0, end)
    return None if start is None or start.end() == end else (start.end(), end)


def _forms(secret: str) -> set[str]:
    """List a secret's forms in text: plain, escaped, quoted, or with percent signs."""
    forms = {secret, unquote(secret), quote(secret, safe="", errors="surrogateescape")}
    for plain in tuple(forms):
        forms |= {
            re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", plain),  # Hydra's grammar, unquoted
            re.sub(r"(\\*)'", r"\1\1\\'", plain),  # its grammar in quotes of either kind
            re.sub(r'(\\*)"', r'\1\1\\"', plain),
            shlex.quote(plain)[1:-1] if shlex.quote(plain) != plain else plain,
            json.dumps(plain)[1:-1],
            json.dumps(plain, ensure_ascii=False)[1:-1],
            repr(plain)[1:-1],
            plain.replace("'", "''"),  # YAML
        }
    return forms


def redact(text: str, secrets: Collection[str] = ()) -> str:
    """Replace every secret in ``text`` by ``***``.

    Secrets are: the values in ``secrets``, Hugging Face tokens (``hf_...``), passwords in URIs
    (``user:pass@``), bearer tokens, and what is assigned to a name that ends in token, password,
    secret or key (``token: x``, ``HF_TOKEN=x``, ``--password x``).
    """
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
        elif secret:
            # Only as a separate word: the password `a` must not hide every letter a.
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    if "://" in text and "@" in text:
        text = _WORD.sub(_hide_password, text)
    text = HUB_TOKEN.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\g<before>{HIDDEN}", text)
    text = _YAML_LINE.sub(rf"\g<before>{HIDDEN}", text)
    return _ASSIGNED.sub(_hide_value, text)


def _hide_password(match: re.Match[str]) -> str:
    """Hide the password of a URI in a word; it ends at the last @, whatever its characters."""
    word = match[0]
    end = word.rfind("@")
    start = _PASSWORD_START.search(word, 0, end) if end > 0 else None
    if start is None or _VARIABLE.fullmatch(word, start.end(), end):
        return word
    return f"{word[: start.end()]}{HIDDEN}{word[end:]}"


def _hide_value(match: re.Match[str]) -> str:
    if _SENTENCE.match(match.string, match.start()) and _ARTICLE.search(
        match.string, max(0, match.start() - 6), match.start()
    ):
        return match[0]
    quote = match["double"] or match["single"] or ""
    return f"{match['before']}{quote}{HIDDEN}{quote}"


def redact_mapping(
    values: Mapping[str, object], secrets: Collection[str] = ()
) -> dict[str, object]:
    """Copy ``values``, with nested mappings and lists, with every secret replaced by ``***``."""
    return {key: _redact_value(key, value, secrets) for key, value in values.items()}


def _redact_value(key: str, value: object, secrets: Collection[str]) -> object:
    if isinstance(value, Mapping):
        return redact_mapping({str(name): element for name, element in value.items()}, secrets)
    if value is None or isinstance(value, bool):
        return value
    if _SECRET_KEY.match(key):
        return HIDDEN if str(value) else value
    if isinstance(value, list | tuple):
        return [_redact_value("", element, secrets) for element in value]
    return redact(value, secrets) if isinstance(value, str) else value
