"""What can go wrong with a board behind ssh: each in a sentence, with what helps."""

from __future__ import annotations

import socket

from mobilekit.devices._session import DeviceError, Trouble
from mobilekit.devices._ssh_address import Address
from mobilekit.errors import first_line, one_line

NO_CLIENT = Trouble("devices behind ssh need the package asyncssh", "pip install 'mobilekit[ssh]'")


class LostError(DeviceError):
    """The connection was there and is gone."""


def lost(address: Address) -> Trouble:
    """A connection that ended by itself."""
    return Trouble(
        f"the connection to {address.account} was lost",
        "check the device's power and network, and run the command again",
    )


def host_key(address: Address, known: bool, said: str) -> Trouble:
    """A host key that is not trusted; `known`: another one is."""
    ssh, where = address.command("ssh"), address.account
    if "revoked" in said:
        return Trouble(f"the host key of {where} is marked as revoked in known_hosts", "ask who looks after the device")
    if known:
        entry = f"[{address.host}]:{address.port}" if address.port not in (None, 22) else address.host
        return Trouble(
            f"{where} shows another host key than known_hosts has: it was set up anew, or somebody is in between",
            f"only if it was set up anew: run `ssh-keygen -R '{entry}'`, then `{ssh}`, which asks for the new key",
        )
    scan = address.command("ssh-keyscan")
    return Trouble(
        f"the host key of {where} is not in ~/.ssh/known_hosts, so that nobody knows whether it is the right device",
        f"run `{ssh}` once and compare the fingerprint that it asks about, or, in a network that you trust, "
        f"`{scan} >> ~/.ssh/known_hosts`",
    )


def of(error: Exception, address: Address, connected: bool = True) -> DeviceError:
    """What an exception of asyncssh or the system means; `connected`: it came up on a connection that stood."""
    import asyncssh

    lost_kinds = (asyncssh.ConnectionLost, asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, ConnectionResetError,
                  BrokenPipeError)  # fmt: skip
    if connected and isinstance(error, (*lost_kinds, asyncssh.DisconnectError)):
        return LostError(lost(address))
    if isinstance(error, asyncssh.SFTPError):
        return DeviceError(storage(error, address))
    if isinstance(error, asyncssh.ChannelOpenError):
        return DeviceError(_no_channel(error, address))
    return DeviceError(_unreachable(error, address))


def _no_channel(error: Exception, address: Address) -> Trouble:
    if "subsystem" in str(error).lower() or "session request failed" in str(error).lower():
        return Trouble(
            f"{address.account} cannot take files: its ssh server has no sftp",
            "install sftp there (Debian: openssh-sftp-server; OpenWrt: opkg install openssh-sftp-server)",
        )
    return Trouble(
        f"{address.account} refused to open a session: {one_line(first_line(error), 150)}",
        "end other sessions there, or raise MaxSessions in its sshd_config",
    )


def storage(error: Exception, address: Address, free: int | None = None, needed: int = 0) -> Trouble:
    """A file that could not be written or read there; `free` and `needed` are bytes."""
    import asyncssh

    where, said = address.account, one_line(first_line(error), 150)
    if isinstance(error, asyncssh.SFTPPermissionDenied):
        return Trouble(
            f"~/.cache/mobilekit on {where} cannot be written: {said}",
            "give that folder and the home folder to the user that measures (`chown`), or log in as another one",
        )
    full = isinstance(error, (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded))
    if full or (free is not None and free < needed):
        room = "" if free is None else f": {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        return Trouble(f"the disk of {where} is full{room}", "free some space in the home folder there")
    if isinstance(error, asyncssh.SFTPFailure) and needed:
        return Trouble(
            f"{where} did not take a file of {needed / 1e6:.1f} MB ({said}): its disk, a quota or a limit is used up",
            "free some space in the home folder there, or raise the user's quota (`quota`, `ulimit -f`)",
        )
    return Trouble(f"files of {where} cannot be used: {said}", "check ~/.cache/mobilekit in the home folder there")


def _unreachable(error: Exception, address: Address) -> Trouble:
    """Why nobody could log in: the first kind that fits."""
    import asyncssh

    where, said = address.account, one_line(first_line(error), 150)
    service = f"{address.host} port {address.port or 22}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else said
    kinds: list[tuple[tuple[type[Exception], ...], str, str]] = [
        (
            (socket.gaierror,),
            f"no host is called '{address.host}' in this network",
            "check the name, give its IP address, or add it to ~/.ssh/config",
        ),
        (
            (ConnectionRefusedError,),
            f"no ssh server answers on {service}",
            "start it there (`sudo systemctl enable --now ssh`), or give its port (ssh:USER@HOST:PORT)",
        ),
        ((TimeoutError,), f"{service} does not answer", "check that it is switched on and in the same network"),
        (
            (asyncssh.PermissionDenied,),
            f"{where} accepts none of your keys",
            f"add yours with `{address.command('ssh-copy-id')}`; a key with a passphrase has to be in the agent "
            "(`ssh-add`), since mobilekit asks for none",
        ),
        (
            (asyncssh.KeyEncryptionError, asyncssh.KeyImportError),
            f"your ssh key cannot be read: {said}",
            "put it into the agent with `ssh-add`",
        ),
        ((asyncssh.ConfigParseError,), f"~/.ssh/config cannot be read: {said}", "correct that line"),
        (
            (asyncssh.KeyExchangeFailed,),
            f"{where} and this machine share no cipher: {said}",
            "bring its ssh server up to date",
        ),
        ((OSError,), f"{service} cannot be reached: {reason}", "check the address and the network"),
    ]
    for types, message, remedy in kinds:
        if isinstance(error, types):
            return Trouble(message, remedy)
    return Trouble(f"{where} cannot be logged in to: {said}", f"see whether `{address.command('ssh')}` works")
