"""A board for tests: a real sshd on loopback with throwaway keys, whose sessions live in a home folder of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SFTP = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")
SESSION = """#!/bin/sh
HOME='{home}'
PATH='{path}'
TMPDIR='{home}/tmp'
export HOME PATH TMPDIR
cd "$HOME" || exit 1
{extra}
exec sh -c "${{SSH_ORIGINAL_COMMAND:-true}}"
"""
CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {root}/host_key
PidFile none
AuthorizedKeysFile {root}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin yes
ForceCommand {root}/session.sh
"""


class Board:
    """An sshd, and the home folder that its sessions see; `user` is the folder of the one who connects."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        self.home = root / "home"
        self.user = root / "user"
        for folder in (self.home / "tmp", self.user / ".ssh", root / "bin"):
            folder.mkdir(parents=True)
        (self.user / ".ssh").chmod(0o700)
        self.key("host_key", root)
        self.key("id_ed25519", self.user / ".ssh")
        shutil.copy(self.user / ".ssh" / "id_ed25519.pub", root / "authorized_keys")
        self.python(sys.executable)
        self.profile("")
        self.know()
        self.sshd: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.port}"

    def key(self, name: str, folder: Path) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throwaway", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def know(self, key: str = "host_key") -> None:
        """Put a key into the user's known_hosts, as that of this board."""
        public = " ".join((self.root / f"{key}.pub").read_text().split()[:2])
        (self.user / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}\n")

    def python(self, program: str | None) -> None:
        """Let `python3` on the board be this program; None: there is none."""
        script = self.root / "bin" / "python3"
        script.unlink(missing_ok=True)
        if program is not None:
            script.write_text(f'#!/bin/sh\nexec "{program}" "$@"\n')
            script.chmod(0o755)

    def profile(self, lines: str, path: str | None = None) -> None:
        """Lines of shell that run before every command of a session."""
        script = self.root / "session.sh"
        found = path if path is not None else f"{self.root}/bin:{self.tools()}"
        script.write_text(SESSION.format(home=self.home, path=found, extra=lines))
        script.chmod(0o755)

    def tools(self) -> Path:
        """A folder with the few commands that a board has anyway, but no python3."""
        folder = self.root / "tools"
        if not folder.exists():
            folder.mkdir()
            for name in ("sh", "cat", "sleep", "uname", "grep", "tr", "sed", "true", "timeout"):
                if found := shutil.which(name):
                    (folder / name).symlink_to(found)
        return folder

    def start(self, extra: str = "") -> None:
        """Listen; `extra` is for sshd's configuration."""
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert sshd is not None, "sshd is missing: make test-devices installs it"
        sshd = os.path.realpath(sshd)
        beside = Path(sshd).parents[2] / "usr/lib/openssh/sftp-server"  # of an unpacked package
        sftp = next(path for path in (*map(Path, SFTP), beside) if path.exists())
        config = self.root / "sshd_config"
        subsystem = "" if "Subsystem" in extra else f"Subsystem sftp {sftp}\n"
        config.write_text(f"{CONFIG.format(port=self.port, root=self.root)}{subsystem}{extra}\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        log = (self.root / "sshd.log").open("ab")
        with log:
            self.sshd = subprocess.Popen(
                [sshd, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(self._answers, "sshd to listen")

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.sshd is not None:
            for pid in self.sessions():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.sshd.kill()
            self.sshd.wait()
            self.sshd = None

    def sessions(self) -> list[int]:
        """Processes of sshd that serve a connection."""
        assert self.sshd is not None
        found, waiting = [], [self.sshd.pid]
        parents = {pid: parent for pid, parent, name in processes() if name.startswith("sshd")}
        while waiting:
            one = waiting.pop()
            children = [pid for pid, parent in parents.items() if parent == one]
            found += children
            waiting += children
        return found

    def running(self, word: str = "") -> list[int]:
        """Processes of the board's sessions whose command line holds this word."""
        found = []
        for pid, _, _ in processes():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:
                continue
            if f"HOME={self.home}".encode() in environment.split(b"\0") and word.encode() in line:
                found.append(pid)
        return found

    def jobs(self) -> list[Path]:
        return list((self.home / ".cache/mobilekit/jobs").glob("*"))


def processes() -> Iterator[tuple[int, int, str]]:
    """pid, parent's pid and name of all of them that live."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        state, parent = rest.split()[:2]
        if state not in "ZX":
            yield int(folder.name), int(parent), name


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_for(condition: object, what: str, seconds: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
