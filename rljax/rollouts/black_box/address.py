"""Where an endpoint listens, by what agents reach it, and who may speak with it."""

import contextlib
import dataclasses
import hmac
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Iterator

from rljax.rollouts.black_box.chat_api import ApiError

TOKEN = "RLJAX_ENDPOINT_TOKEN"
"""The environment variable that holds the token."""

_LEAST_LENGTH = 16  # of a token that a whole network may guess at
_ADVERTISED = re.compile(r"https?://[^\s/?#@]+(/[\w.\-/]*)?|(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d+)?|[\da-fA-F:.]+")
_SAYABLE = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what may follow `Bearer` in a header (RFC 6750)


@dataclasses.dataclass
class EndpointConfig:
    """Where agents reach the policy. Raises ValueError, in `check`, for values that can never work.

    Beyond this machine every request must bring a token, as an API key is brought: the value of `RLJAX_ENDPOINT_TOKEN`.
    A fresh one is made where the variable is not set; while the endpoint is open, agents find it in their environment.
    What goes over the network is not encrypted.
    """

    host: str = "127.0.0.1"
    """Address that it listens on. `0.0.0.0`, or one of this machine's, for agents on other machines."""
    port: int = 0
    """Port that it listens on; 0 takes a free one. Set it where a firewall lets certain ports through."""
    advertised: str = ""
    """By what agents reach it, where that is not `host` and `port`: `name`, `name:port`, or the address of a proxy,
    such as `https://policy.example`. Empty for `host`, or for the name of this machine if it listens on all
    addresses."""

    def check(self) -> None:
        if not self.host or re.search(r"[\s/]", self.host):
            raise ValueError(f"EndpointConfig: host={self.host!r} must be an address or a name, such as '0.0.0.0'")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"EndpointConfig: port={self.port} must be at least 0 and at most 65535")
        if self.advertised and not _ADVERTISED.fullmatch(self.advertised):
            raise ValueError(
                f"EndpointConfig: advertised={self.advertised!r} must be a name, name:port or an http(s) address"
            )

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it, be it through a proxy on this one."""
        if self.advertised:
            return True
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may mean any address
            return True

    def origin(self, port: int) -> str:
        """What its URLs begin with, if it listens on `port`."""
        name = self.advertised.rstrip("/")
        if "://" in name:
            return name
        if not name:
            name = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        if name.count(":") > 1 and "[" not in name:  # an address of IPv6, which has colons of its own
            name = f"[{name}]"
        has_port = ":" in name.rpartition("]")[2]
        return f"http://{name}" if has_port else f"http://{name}:{port}"


@contextlib.contextmanager
def open_token(config: EndpointConfig) -> Iterator[str]:
    """The token that requests must bring, empty if they need none. Within, it stands in the environment, which agents
    and what they start inherit. Raises ValueError, which does not show it, for one that cannot be used."""
    if not config.is_open:
        yield ""
        return

    given = os.environ.get(TOKEN, "")
    if given and (len(given) < _LEAST_LENGTH or not _SAYABLE.fullmatch(given)):
        raise ValueError(
            f"{TOKEN} must have at least {_LEAST_LENGTH} characters, letters, digits and -._~+/ alone; unset it to "
            "have one made"
        )
    token = given or secrets.token_urlsafe(32)
    os.environ[TOKEN] = token
    try:
        yield token
    finally:
        if not given:
            os.environ.pop(TOKEN, None)


def session_of(key: str, token: str) -> str:
    """The session that an API key names: TOKEN.SESSION, or the session alone where no token is needed; empty for the
    token alone. Raises ApiError for a key without the token."""
    if not token:
        return key
    before, _, session = key.rpartition(".")
    # both are compared, and to their ends, so that the time tells nothing of the token
    is_token = hmac.compare_digest(key.encode(), token.encode())
    has_session = hmac.compare_digest(before.encode(), token.encode())
    if not is_token | has_session:
        raise ApiError(
            f"this endpoint wants its token as API key (Authorization: Bearer TOKEN); agents find it in the variable "
            f"{TOKEN} of the process that started them",
            status=401,
            code="invalid_api_key",
        )
    return "" if is_token else session
