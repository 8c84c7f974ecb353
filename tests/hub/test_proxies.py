"""The hub and a tracking server through proxies of the environment, and proxies that fail."""

from __future__ import annotations

import datetime
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hub_fetch import TOKENS, fetch, loopback_hub, whole
from hub_server import Hub, _Handler
from huggingface_hub import close_session, constants
from proxy_server import NAME, PASSWORD, proxy_to

from runner.core.errors import StageError, UserError
from runner.core.proxy import proxy_of, wrong_proxy
from runner.hub import remote
from runner.tracking.server import check_server

__all__ = ["loopback_hub"]

SIGNED_IN = f"{NAME}:{PASSWORD}@"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy but those that a test sets, and no connection of another test."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    close_session()
    yield
    close_session()


def elsewhere(monkeypatch: pytest.MonkeyPatch, place: str = "http://hub.invalid") -> None:
    """The hub has an address that this computer can't look up."""
    template = place + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def tracking_server() -> Iterator[int]:
    """The port of a server that answers a search for experiments as MLflow does: there are none."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            body = json.dumps({}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


KINDS = [("HTTP_PROXY", "http"), ("all_proxy", "http"), ("ALL_PROXY", "socks5h")]


# Files come whole through an HTTP proxy and a SOCKS proxy, with a name and a password and without,
# from a host that only the proxy can look up.
@pytest.mark.parametrize("user", ["", SIGNED_IN], ids=["open", "password"])
@pytest.mark.parametrize(("variable", "scheme"), KINDS)
def test_downloads(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str, user: str
) -> None:
    elsewhere(monkeypatch)
    with proxy_to(hub.port, wants_password=bool(user)) as proxy:
        monkeypatch.setenv(variable, f"{scheme}://{user}127.0.0.1:{proxy.port}")
        fetch(tmp_path)
    whole(tmp_path)
    assert any("hub.invalid" in asked for asked in proxy.asked)


# The same for the tracking server.
@pytest.mark.parametrize("user", ["", SIGNED_IN], ids=["open", "password"])
@pytest.mark.parametrize(("variable", "scheme"), KINDS)
def test_tracking(
    tracking_server: int, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str, user: str
) -> None:
    with proxy_to(tracking_server, wants_password=bool(user)) as proxy:
        monkeypatch.setenv(variable, f"{scheme}://{user}127.0.0.1:{proxy.port}")
        check_server("http://mlflow.invalid:5000")
    assert any("mlflow.invalid" in asked for asked in proxy.asked)


# An https address goes through a tunnel that an HTTP proxy opens with CONNECT.
def test_https(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = certificate_for("hub.invalid", tmp_path / "certificate.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    elsewhere(monkeypatch, "https://hub.invalid")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with _tls(hub, context) as port, proxy_to(port, wants_password=True) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{SIGNED_IN}127.0.0.1:{proxy.port}")
        assert fetch(tmp_path, TOKENS)
        assert set(proxy.asked) == {"CONNECT hub.invalid:443"}
        close_session()
        monkeypatch.setenv("HTTPS_PROXY", f"http://ann:wrong@127.0.0.1:{proxy.port}")
        with pytest.raises(StageError, match="refuses this name and password, or wants them"):
            fetch(tmp_path / "other", TOKENS)


# A proxy that can't be used is one line, which names its variable and never the password.
@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("foo://{user}127.0.0.1:9", "ALL_PROXY can't be used (foo:// is no known kind of proxy"),
        ("http://{user}127.0.0.1:x", "ALL_PROXY can't be used (no address): write http://"),
        ("http://a:s/{user}h:1", "ALL_PROXY can't be used (no address): write http://"),
        ("http://{user}127.0.0.1:{dead}", "ALL_PROXY (127.0.0.1:{dead}) can't be reached ("),
        ("socks5://{user}127.0.0.1:{dead}", "ALL_PROXY (127.0.0.1:{dead}) can't be reached ("),
        ("http://no.invalid:1", "ALL_PROXY (no.invalid:1) can't be reached ("),
        ("http://127.0.0.1:{alive}", "ALL_PROXY=http://NAME:PASSWORD@127.0.0.1:{alive}"),
        ("http://ann:wrongpass@127.0.0.1:{alive}", "refuses this name and password, or wants them"),
        ("socks5h://127.0.0.1:{alive}", "ALL_PROXY=socks5h://NAME:PASSWORD@127.0.0.1:{alive}"),
        ("socks5h://ann:wrongpass@127.0.0.1:{alive}", "refuses this name and password"),
    ],
)
def test_refusals(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, line: str
) -> None:
    elsewhere(monkeypatch)
    with socket.socket() as taken, proxy_to(hub.port, wants_password=True) as proxy:
        taken.bind(("127.0.0.1", 0))  # and nothing listens
        names = {"user": SIGNED_IN, "dead": taken.getsockname()[1], "alive": proxy.port}
        monkeypatch.setenv("ALL_PROXY", value.format(**names))
        with pytest.raises(StageError) as of_hub:
            fetch(tmp_path, TOKENS)
        with pytest.raises(UserError) as of_server:
            check_server("http://mlflow.invalid:5000")
    for said in (str(of_hub.value), str(of_server.value)):
        assert line.format(**names) in said
        assert "\n" not in said and PASSWORD not in said and "wrongpass" not in said


# Which variable counts: that of the scheme before the one for all, and none for an exempted host.
def test_which_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_of("http://a.example") is None and wrong_proxy() is None
    monkeypatch.setenv("ALL_PROXY", "socks5://all")
    monkeypatch.setenv("https_proxy", "one:3128")
    monkeypatch.setenv("NO_PROXY", "local.example")
    one, every = proxy_of("https://a.example"), proxy_of("http://a.example")
    assert one is not None and every is not None
    assert (one.variable, one.scheme, one.host, one.port) == ("https_proxy", "http", "one", 3128)
    assert (every.variable, every.scheme, every.port) == ("ALL_PROXY", "socks5", 1080)
    assert proxy_of("http://local.example") is None
    # A variable that an address does not use can't be wrong for it, but for all that may be asked.
    monkeypatch.setenv("ALL_PROXY", "foo://all")
    assert wrong_proxy(url="https://a.example") is None
    for url in (None, "http://a.example"):
        assert (wrong_proxy(url=url) or "").startswith("ALL_PROXY can't be used (foo:// is no")


@contextmanager
def _tls(hub: Hub, context: ssl.SSLContext) -> Iterator[int]:
    """Serve ``hub`` by TLS on another port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def certificate_for(host: str, file: Path) -> Path:
    """Write a certificate that signs itself, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return file
