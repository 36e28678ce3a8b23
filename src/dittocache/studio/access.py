"""Who may reach the Studio: the addresses that it answers to, and the token that others than this machine need."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode

TOKEN_PARAMETER = "token"
_TOKEN_BYTES = 32
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Access:
    """How the Studio may be reached.

    Attributes:
        host: address that it listens on.
        port: port that it listens on.
        token: what a visitor must know; None where only this machine can connect.
        names: host names, in lower case, that a request may be addressed to.
        any_address: whether it may also be addressed to any IP address, none of which a hostile name server can give.
    """

    host: str
    port: int
    token: str | None = field(default=None, repr=False)
    names: frozenset[str] = _LOCAL_NAMES
    any_address: bool = False

    @property
    def url(self) -> str:
        """What to open in a browser, token included: shown once in the terminal, kept nowhere."""
        host = socket.gethostname() if is_unspecified(self.host) else self.host
        query = f"?{urlencode({TOKEN_PARAMETER: self.token})}" if self.token else ""
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/{query}"

    @property
    def cookie(self) -> str:
        """Name of the cookie that holds the token; cookies know no ports, so that the name tells two Studios apart."""
        return f"dittocache-studio-{self.port}"

    def answers_to(self, host_header: str) -> bool:
        """Whether a request may be addressed so: another site cannot reach the Studio by a name of its own."""
        name = host_name(host_header)
        return name in self.names or (self.any_address and _address(name) is not None)

    def accepts(self, token: str | None) -> bool:
        """Whether the token is right, compared in constant time; anything is where none is needed."""
        if self.token is None:
            return True
        return hmac.compare_digest((token or "").encode(errors="surrogateescape"), self.token.encode())


def access_for(host: str, port: int, names: Sequence[str] = ()) -> Access:
    """Access of a Studio that listens on `host`: open on this machine alone, behind a new token anywhere else.

    Args:
        names: further host names that it is reached by, behind a proxy for example.
    """
    known = _LOCAL_NAMES | {host.lower()} | {name.lower() for name in names}
    if is_loopback(host):
        return Access(host, port, None, known)
    own = {name.lower() for name in (socket.gethostname(), socket.getfqdn())}
    return Access(host, port, secrets.token_urlsafe(_TOKEN_BYTES), known | own, any_address=True)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to the address."""
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def is_unspecified(host: str) -> bool:
    """Whether the address stands for all of this machine's."""
    address = _address(host)
    return host == "" if address is None else address.is_unspecified


def host_name(host_header: str) -> str:
    """The name of a `Host` header, in lower case, without port and brackets; empty for a malformed one."""
    name, rest = host_header.strip().lower(), ""
    if name.startswith("["):
        name, closing, rest = name[1:].partition("]")
        if not closing or (rest and not rest.startswith(":")):
            return ""
        rest = rest[1:]
    elif ":" in name:
        name, _, rest = name.partition(":")
    return name if not rest or (rest.isascii() and rest.isdigit()) else ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
