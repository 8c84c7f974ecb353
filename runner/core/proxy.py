"""The proxies of the environment, and what is wrong with one; its password is in no message.

As curl, requests and httpx have it: ``https_proxy`` or ``HTTPS_PROXY`` for an https address, else
``all_proxy`` or ``ALL_PROXY``, unless ``no_proxy`` names the host.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

# What both httpx and requests know; they take an address without a scheme for http.
SCHEMES = ("http", "https", "socks5", "socks5h")
CONNECT_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}
# A proxy's answer by HTTP, or by SOCKS as httpcore and PySocks describe it.
_UNAUTHORISED = re.compile(r"\b407\b|authentication|username|acceptable methods", re.IGNORECASE)


@dataclass(frozen=True)
class Proxy:
    """A proxy, and the variable that names it."""

    variable: str
    scheme: str
    host: str
    port: int

    @property
    def described(self) -> str:
        """The proxy by its variable and place."""
        return f"the proxy of {self.variable} ({self.host}:{self.port})"


def proxy_of(url: str) -> Proxy | None:
    """Return the proxy of the environment that requests of ``url`` go through, if it has one."""
    return next((_parsed(name, value) for name, value in _used(url)), None)


def wrong_proxy(schemes: Sequence[str] = SCHEMES, url: str | None = None) -> str | None:
    """Describe the first variable of the environment that is no proxy's address, in one line.

    Args:
        schemes: those that are known to whoever is to use the proxy.
        url: the one address that is asked, whose variable alone matters; None for all variables.
    """
    found = list(_set("http", "https", "all") if url is None else _used(url)[:1])
    for variable, value in found:
        proxy = _parsed(variable, value)
        if proxy is None or proxy.scheme not in schemes:
            others = ", ".join(f"{scheme}://" for scheme in schemes[1:])
            why = f"{proxy.scheme}:// is no known kind of proxy" if proxy else "no address"
            return (
                f"{variable} can't be used ({why}): write http://HOST:PORT (or {others}), "
                "with %40 for @, %2F for / and the like in a password, or unset it"
            )
    return None


def proxy_failure(url: str, reason: str) -> str | None:
    """Describe why a request failed if its proxy is the cause; this connects to the proxy.

    Args:
        url: the address of the request.
        reason: what the library says.
    """
    proxy = proxy_of(url)
    if proxy is None:
        return None
    if _UNAUTHORISED.search(reason):
        return (
            f"{proxy.described} refuses this name and password, or wants them (407): "
            f"{proxy.variable}={proxy.scheme}://NAME:PASSWORD@{proxy.host}:{proxy.port}"
        )
    if problem := unreachable(proxy):
        return problem
    # What urllib3 says is long, with its cause at the end.
    cause = reason.rpartition("Caused by ")[2]
    return f"{proxy.described} does not reach it ({cause[:200]})"


def unreachable(proxy: Proxy) -> str | None:
    """Connect to a proxy; return what is wrong in one line, or None."""
    try:
        socket.create_connection((proxy.host, proxy.port), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", error)
        return f"{proxy.described} can't be reached ({why}): correct {proxy.variable} or unset it"
    return None


def _used(url: str) -> list[tuple[str, str]]:
    """List the names and values of the variables for an address, the one that counts first."""
    parts = urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return []
    return list(_set(parts.scheme, "all"))


def _set(*schemes: str) -> Iterator[tuple[str, str]]:
    """Yield the names and values of the variables that are set for the schemes."""
    known = urllib.request.getproxies_environment()
    for scheme in schemes:
        if value := known.get(scheme):
            names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
            yield next((name for name in names if os.environ.get(name) == value), names[1]), value


def _parsed(variable: str, value: str) -> Proxy | None:
    """Read a proxy's address; None if it is none."""
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        port = parts.port or _PORTS.get(parts.scheme, 1080)
    except ValueError:
        return None
    return Proxy(variable, parts.scheme, parts.hostname, port) if parts.hostname else None
