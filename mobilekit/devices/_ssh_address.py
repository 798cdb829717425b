"""Where a board is: USER@HOST:PORT, checked so strictly that it can stand in any command line."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from mobilekit.errors import BadInputError, one_line

USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?\.?")
BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]{2,60})(%[A-Za-z0-9_-]{1,30})?\]")
FORM = "write ssh:USER@HOST or ssh:USER@HOST:PORT, and an IPv6 address in brackets (ssh:pi@[fe80::1]:22)"


class Address(NamedTuple):
    """A user's account on a host. What is None is taken from ~/.ssh/config, or is ssh's default."""

    user: str | None
    host: str
    port: int | None

    @property
    def account(self) -> str:
        """USER@HOST, as the `ssh` command takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def command(self, program: str) -> str:
        """How one of OpenSSH's programs (`ssh`, `ssh-copy-id`, `ssh-keyscan`) is told to reach it."""
        port = f" -p {self.port}" if self.port else ""
        return f"{program}{port} {self.host if program == 'ssh-keyscan' else self.account}"


def parse(text: str) -> Address:
    """The address in `USER@HOST:PORT`; user and port may be absent. Raises BadInputError.

    >>> parse("pi@[fe80::1%eth0]:2222")
    Address(user='pi', host='fe80::1%eth0', port=2222)
    """
    shown = one_line(text, 80)
    user, at, rest = text.rpartition("@")
    if at and not USER.fullmatch(user):
        raise BadInputError(f"'{shown}' has no valid user name in front of '@': {FORM}")
    if bracketed := BRACKETED.match(rest):
        host, rest = bracketed[1] + (bracketed[2] or ""), rest[bracketed.end() :]
        try:
            ipaddress.IPv6Address(bracketed[1])
        except ValueError as error:
            raise BadInputError(f"'{shown}' has no valid IPv6 address in its brackets: {FORM}") from error
    else:
        host, colon, rest = rest.partition(":")
        rest = colon + rest
        if not HOST.fullmatch(host):
            raise BadInputError(f"'{shown}' is not the address of a board: {FORM}")
    return Address(user or None, host, _port(rest, shown))


def _port(rest: str, shown: str) -> int | None:
    """The port in `:PORT`, or None where nothing is said."""
    if not rest:
        return None
    digits = re.fullmatch(r":([0-9]{1,5})", rest)
    port = int(digits[1]) if digits else 0
    if not 1 <= port <= 65535:
        raise BadInputError(f"'{shown}' has no valid port (1 to 65535) behind its host: {FORM}")
    return port
