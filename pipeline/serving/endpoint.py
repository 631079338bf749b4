"""Addresses: where a server listens, what counts as this machine alone, and keys beyond it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from storage.errors import UsageError, reason

LONGEST_IPC = 107  # bytes of a Unix socket's path, by the kernel's sockaddr_un


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Key files of one side, as `zmq.auth.create_certificates` writes them."""

    secret: Path  # this side's own pair
    peers: Path  # server: directory of the clients' public keys; client: the server's public key file

    def own(self) -> tuple[bytes, bytes]:
        """(public, secret). Raises UsageError."""
        public, secret = _load(self.secret)
        if secret is None:
            raise UsageError(f"{self.secret} holds no secret key")
        return public, secret

    def server_key(self) -> bytes:
        return _load(self.peers)[0]


def _load(path: Path) -> tuple[bytes, bytes | None]:
    import zmq.auth

    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"the key file {path} cannot be read: {reason(error)}") from error


def make_keys(directory: Path) -> list[Path]:
    """Write a pair for the server and one for a first client; the files written.

    Layout: `server.key_secret`, `client.key_secret`, and `clients/`, the public keys that are let
    in. Raises UsageError when there are keys already.
    """
    import zmq.auth

    if (directory / "server.key_secret").exists():
        raise UsageError(f"{directory} holds keys already")
    clients = directory / "clients"
    clients.mkdir(parents=True, exist_ok=True, mode=0o700)
    old = os.umask(0o077)
    try:
        zmq.auth.create_certificates(str(directory), "server")
        zmq.auth.create_certificates(str(directory), "client")
    finally:
        os.umask(old)
    (directory / "client.key").rename(clients / "client.key")
    return sorted(path for path in directory.rglob("*") if path.is_file())


def default_endpoint() -> str:
    """A socket in a directory of this user's own, also where `su` has left another's XDG_RUNTIME_DIR."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    with contextlib.suppress(OSError):
        if base and os.stat(base).st_uid != os.getuid():
            base = ""
    base = base or tempfile.gettempdir()
    return f"ipc://{Path(base) / f'flashring.{os.getuid()}' / 'ring.sock'}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_host(address: str) -> tuple[str, int]:
    """`HOST:PORT`; port 0 takes any free one. Raises UsageError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{address!r} is not HOST:PORT, such as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def check_endpoint(endpoint: str, keys: CurveKeys | None) -> None:
    """Whether a server may listen there. Raises UsageError."""
    if endpoint.startswith("ipc://"):
        if endpoint.startswith("ipc://@"):
            raise UsageError("an abstract ipc address has no permissions; use a path")
        return _check_path(Path(endpoint.removeprefix("ipc://")))
    if not endpoint.startswith("tcp://"):
        raise UsageError(f"the endpoint {endpoint!r} is neither ipc://PATH nor tcp://HOST:PORT")
    host, _ = split_host(endpoint.removeprefix("tcp://"))
    if not is_loopback(host) and keys is None:
        raise UsageError(f"{endpoint} is reachable from other machines, so it needs --curve-keys DIR")
    return None


def check_server(endpoint: str) -> None:
    """Whether a client may connect there. Raises UsageError.

    Where sockets lie in /tmp, another user could have made the directory first, to be told every prompt.
    """
    if endpoint.startswith("ipc://"):
        with contextlib.suppress(OSError):  # where it cannot be reached, neither can a socket in it
            _check_owner(Path(endpoint.removeprefix("ipc://")).parent)


def check_http(address: str, api_key: str) -> tuple[str, int]:
    """Host and port of an HTTP server that may listen there. Raises UsageError."""
    host, port = split_host(address)
    if not is_loopback(host) and not api_key:
        raise UsageError(f"{address} is reachable from other machines, so it needs --api-key-file FILE")
    return host, port


def _check_path(path: Path) -> None:
    if len(os.fsencode(path)) > LONGEST_IPC:
        raise UsageError(f"the socket's path has more than {LONGEST_IPC} bytes: {path}")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_owner(path.parent)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        raise UsageError(f"another server listens on {path}")


def _check_owner(directory: Path) -> None:
    """Raises UsageError where it, or the link to it, is another user's, and OSError where it is missing."""
    if not {directory.lstat().st_uid, directory.stat().st_uid} <= {os.getuid(), 0}:
        raise UsageError(f"{directory} belongs to another user")
