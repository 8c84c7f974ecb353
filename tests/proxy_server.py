"""A proxy on loopback for HTTP (forwarding and CONNECT) and SOCKS5, with a name and a password.

Whatever host is asked for, it connects to one port of this computer: a name that no other computer
knows can only have been reached through it.
"""

from __future__ import annotations

import base64
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from socket import create_connection, socket

NAME, PASSWORD = "ann", "gEh3iMnI5"


@dataclass
class Proxy:
    """Where the proxy connects to, whether it wants the name and password, and what was asked."""

    target: int
    wants_password: bool = False
    asked: list[str] = field(default_factory=list)
    port: int = 0


@contextmanager
def proxy_to(target: int, *, wants_password: bool = False) -> Iterator[Proxy]:
    """Run a proxy to a port of 127.0.0.1 while the block runs."""
    proxy = Proxy(target, wants_password)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        proxy.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield proxy
        finally:
            server.shutdown()


class _Handler(socketserver.StreamRequestHandler):
    proxy: Proxy

    def handle(self) -> None:
        first = self.rfile.read(1)
        if first == b"\x05":
            self._socks()
        elif first:
            self._http(first)

    def _socks(self) -> None:
        """RFC 1928, and RFC 1929 for the name and password."""
        methods = self.rfile.read(self.rfile.read(1)[0])
        wanted = 2 if self.proxy.wants_password else 0
        if wanted not in methods:
            self.wfile.write(b"\x05\xff")
            return
        self.wfile.write(bytes([5, wanted]))
        if wanted:
            self.rfile.read(1)
            name, password = (self.rfile.read(self.rfile.read(1)[0]).decode() for _ in range(2))
            good = (name, password) == (NAME, PASSWORD)
            self.wfile.write(bytes([1, not good]))
            if not good:
                return
        *_, kind = self.rfile.read(4)
        host = self.rfile.read(self.rfile.read(1)[0] if kind == 3 else 4)
        self.rfile.read(2)
        self.proxy.asked.append("socks " + (host.decode() if kind == 3 else "address"))
        with create_connection(("127.0.0.1", self.proxy.target)) as there:
            self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
            self._tunnel(there)

    def _http(self, first: bytes) -> None:
        line = first + self.rfile.readline()
        headers: list[bytes] = []
        while (header := self.rfile.readline()) not in (b"\r\n", b""):
            headers.append(header)
        method, address = line.decode().split()[:2]
        password = base64.b64encode(f"{NAME}:{PASSWORD}".encode())
        if self.proxy.wants_password and not any(password in header for header in headers):
            answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n"
            self.wfile.write(answer + b"Proxy-Authenticate: Basic\r\nConnection: close\r\n\r\n")
            return
        self.proxy.asked.append(f"{method} {address}")
        with create_connection(("127.0.0.1", self.proxy.target)) as there:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                kept = [h for h in headers if not h.lower().startswith((b"proxy-", b"connection"))]
                there.sendall(b"".join([line, *kept, b"Connection: close\r\n\r\n"]))
            self._tunnel(there)

    def _tunnel(self, there: socket) -> None:
        back = threading.Thread(target=_copy, args=(there, self.connection), daemon=True)
        back.start()
        _copy(self.connection, there)
        back.join()


def _copy(source: socket, sink: socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(1)
    except OSError:
        pass
