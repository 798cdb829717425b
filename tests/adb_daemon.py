"""A small device behind the real adb client: speaks the adb device protocol over TCP and runs commands in a real `sh`.

The protocol is that of AOSP's packages/modules/adb (protocol.txt, file_sync_service.h, shell_protocol.h). Like adbd, it
leaves a raw shell's command running when the connection breaks; only its standard input ends. Paths are the machine's
own: the device's folder must lie in a folder of the test.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

VERSION = 0x01000001
MOST_PAYLOAD = 256 * 1024
CHUNK = 64 * 1024
MODERN = ("shell_v2", "cmd", "stat_v2", "ls_v2")
"""What a device since Android 7 offers."""


@dataclass
class Faults:
    """What the device does wrong; may be changed while it runs."""

    answers_nothing: bool = False
    """New connections are accepted and never greeted: the device is "offline"."""
    refuses: bool = False
    """New connections are closed at once."""
    unauthorized: bool = False
    """Asks for a key again and again."""
    delay: float = 0.0
    """Seconds before each message that it sends."""
    drop_after_bytes: int | None = None
    """Breaks the connection when so many bytes of files came in, once."""
    room: int | None = None
    """Bytes that still fit on it."""
    bent: dict[str, bytes] = field(default_factory=dict)
    """Name of a file -> what is sent in its place when it is pulled."""


class GoneError(Exception):
    """The connection or the stream was closed."""


class Stream:
    """One of the connection's streams, with its own flow control: each WRTE waits for the OKAY of the one before."""

    def __init__(self, connection: Connection, local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self.inbox: queue.Queue[bytes | None] = queue.Queue()
        self.ready = threading.Semaphore(0)
        self.closed = False
        self.rest = b""

    def send(self, data: bytes) -> None:
        for start in range(0, len(data), self.connection.most):
            self.connection.send(b"WRTE", self.local, self.remote, data[start : start + self.connection.most])
            self.ready.acquire()
            if self.closed:
                raise GoneError

    def receive(self) -> bytes:
        """What came next; acknowledged when it is taken."""
        data = self.inbox.get()
        if data is None:
            raise GoneError
        self.connection.send(b"OKAY", self.local, self.remote)
        return data

    def exactly(self, count: int) -> bytes:
        while len(self.rest) < count:
            self.rest += self.receive()
        data, self.rest = self.rest[:count], self.rest[count:]
        return data

    def end(self) -> None:
        """The other side closed it, or the connection broke."""
        self.closed = True
        self.inbox.put(None)
        self.ready.release()

    def close(self) -> None:
        with contextlib.suppress(GoneError):
            self.connection.send(b"CLSE", self.local, self.remote)
        self.connection.streams.pop(self.local, None)
        self.end()


class Connection:
    """A client's adb server on the line."""

    def __init__(self, daemon: AdbDaemon, line: socket.socket) -> None:
        self.daemon, self.line = daemon, line
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}
        self.most = 4096
        self.count = 0

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        time.sleep(self.daemon.faults.delay)
        (number,) = struct.unpack("<I", command)
        header = struct.pack("<6I", number, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        try:
            with self.lock:
                self.line.sendall(header + data)
        except OSError as error:
            raise GoneError from error

    def read(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            try:
                part = self.line.recv(count - len(parts))
            except OSError as error:
                raise GoneError from error
            if not part:
                raise GoneError
            parts += part
        return parts

    def serve(self) -> None:
        with contextlib.suppress(GoneError):
            while True:
                number, first, second, length, _, _ = struct.unpack("<6I", self.read(24))
                self.take(struct.pack("<I", number), first, second, self.read(length))
        self.drop()

    def take(self, command: bytes, first: int, second: int, data: bytes) -> None:
        faults = self.daemon.faults
        if command == b"CNXN":
            self.most = min(second, MOST_PAYLOAD)
        if command == b"CNXN" or (command == b"AUTH" and first == 2):  # 3: a key that a person has to allow
            if faults.answers_nothing:
                return
            if faults.unauthorized:
                self.send(b"AUTH", 1, 0, bytes(20))
            else:
                self.send(b"CNXN", VERSION, MOST_PAYLOAD, self.daemon.banner)
        elif command == b"OPEN":
            self.count += 1
            stream = Stream(self, self.count, first)
            self.streams[self.count] = stream
            self.daemon.start(self.daemon.answer, stream, data.rstrip(b"\0").decode())
        elif second in self.streams:
            stream = self.streams[second]
            if command == b"OKAY":
                stream.ready.release()
            elif command == b"WRTE":
                stream.inbox.put(data)
            elif command == b"CLSE":
                self.streams.pop(second)
                stream.end()

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self.line.shutdown(socket.SHUT_RDWR)
        self.line.close()
        for stream in list(self.streams.values()):
            stream.end()


class AdbDaemon:
    """A device; `serial` is what `adb connect` takes. Used as a context manager."""

    def __init__(self, features: tuple[str, ...] = MODERN, **properties: str) -> None:
        named = {"ro.product.name": "kit", "ro.product.model": "Kit_1", "ro.product.device": "kit", **properties}
        banner = "".join(f"{key}={value};" for key, value in named.items()) + "features=" + ",".join(features)
        self.features, self.banner = features, b"device::" + banner.encode()
        self.faults = Faults()
        self.path = os.environ["PATH"]
        """Where its shell finds commands."""
        self.services: list[str] = []
        """What was asked of it, oldest first."""
        self.connections: list[Connection] = []
        self.commands: list[subprocess.Popen[bytes]] = []
        self.threads: list[threading.Thread] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.serial = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> AdbDaemon:
        self.start(self.listen)
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.disconnect()
        for command in self.commands:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread of the device hangs"

    def start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def listen(self) -> None:
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            if self.faults.refuses:
                line.close()
                continue
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, line)
            self.connections.append(connection)
            self.start(connection.serve)

    def disconnect(self) -> None:
        """Pull the cable out, and put it back in unless `faults` forbid it."""
        for connection in self.connections:
            connection.drop()
        self.connections.clear()

    def answer(self, stream: Stream, service: str) -> None:
        """Open a stream to a service."""
        self.services.append(service)
        name, _, rest = service.partition(":")
        kind, *options = name.split(",")
        with contextlib.suppress(GoneError):
            stream.connection.send(b"OKAY", stream.local, stream.remote)
            if kind == "sync":
                FileSync(self, stream).serve()
            elif "v2" in options:
                self.shell(stream, rest)
            elif kind == "shell":
                self.terminal(stream, rest)
            stream.close()

    # ------------------------------------------------------------ commands

    def environment(self) -> dict[str, str]:
        return {"PATH": self.path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    def shell(self, stream: Stream, script: str) -> None:
        """Shell protocol 2: separate streams and an exit code. The command outlives the connection."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            ["sh", "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, env=self.environment()
        ) as command:
            self.commands.append(command)
            self.start(self.feed, stream, command)
            readers = []
            for identity, output in ((1, command.stdout), (2, command.stderr)):
                reader = threading.Thread(target=self.forward, args=(stream, identity, output), daemon=True)
                readers.append(reader)
                reader.start()
            for reader in readers:
                reader.join()
            code = command.wait()
            if not stream.closed:
                stream.send(struct.pack("<BIB", 3, 1, code if code >= 0 else 128 - code))

    def feed(self, stream: Stream, command: subprocess.Popen[bytes]) -> None:
        """Hand on what the client types, until it closes its end or is gone."""
        assert command.stdin is not None
        with contextlib.suppress(GoneError, BrokenPipeError, ValueError):
            while True:
                identity, length = struct.unpack("<BI", stream.exactly(5))
                data = stream.exactly(length)
                if identity == 0:
                    command.stdin.write(data)
                    command.stdin.flush()
                elif identity in (3, 4):
                    break
        with contextlib.suppress(BrokenPipeError):
            command.stdin.close()

    def forward(self, stream: Stream, identity: int, output: object) -> None:
        descriptor = output.fileno()  # type: ignore[attr-defined]
        gone = False
        while data := os.read(descriptor, CHUNK):
            if not gone:
                try:
                    stream.send(struct.pack("<BI", identity, len(data)) + data)
                except GoneError:
                    gone = True

    def terminal(self, stream: Stream, script: str) -> None:
        """The older shell: a terminal, no exit code; when the connection breaks the terminal hangs up."""
        master, slave = os.openpty()
        command = subprocess.Popen(
            ["setsid", "-c", "sh", "-c", script], stdin=slave, stdout=slave, stderr=slave, env=self.environment()
        )
        os.close(slave)
        self.start(self.watch, stream, master)
        with contextlib.suppress(OSError, GoneError):  # EIO: nobody holds the other end any longer
            while data := os.read(master, CHUNK):
                stream.send(data)
        os.close(master)
        command.wait()

    def watch(self, stream: Stream, master: int) -> None:
        with contextlib.suppress(GoneError, OSError):
            while True:
                os.write(master, stream.receive())
        for command in self.commands:
            command.poll()


class FileSync:
    """The service that moves files."""

    def __init__(self, daemon: AdbDaemon, stream: Stream) -> None:
        self.daemon, self.stream = daemon, stream

    def serve(self) -> None:
        answers = {b"STAT": self.status, b"STA2": self.status_2, b"LST2": self.status_2, b"SEND": self.take,
                   b"RECV": self.give}  # fmt: skip
        while True:
            name, length = struct.unpack("<4sI", self.stream.exactly(8))
            if name == b"QUIT":
                return
            answers[name](name, self.stream.exactly(length).decode())

    def status(self, name: bytes, path: str) -> None:
        try:
            found = os.lstat(path)
            facts = found.st_mode, found.st_size, int(found.st_mtime)
        except OSError:
            facts = 0, 0, 0
        self.stream.send(name + struct.pack("<3I", *facts))

    def status_2(self, name: bytes, path: str) -> None:
        try:
            found = os.lstat(path) if name == b"LST2" else os.stat(path)
            facts = (0, found.st_dev, found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid,
                     found.st_size, int(found.st_atime), int(found.st_mtime), int(found.st_ctime))  # fmt: skip
        except OSError as error:
            facts = (error.errno or 1,) + 10 * (0,)
        self.stream.send(name + struct.pack("<I2Q4IQ3q", *facts))

    def chunks(self) -> Iterator[bytes]:
        """What is sent until DONE."""
        while True:
            name, length = struct.unpack("<4sI", self.stream.exactly(8))
            if name == b"DONE":
                return
            data = self.stream.exactly(length)
            faults = self.daemon.faults
            if faults.drop_after_bytes is not None:
                faults.drop_after_bytes -= len(data)
                if faults.drop_after_bytes < 0:
                    faults.drop_after_bytes = None
                    self.daemon.disconnect()
                    raise GoneError
            yield data

    def take(self, _: bytes, where: str) -> None:
        name, _, mode = where.rpartition(",")
        path = Path(name)
        problem = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with path.open("wb") as file:
                for data in self.chunks():
                    if self.daemon.faults.room is not None:
                        self.daemon.faults.room -= len(data)
                        if self.daemon.faults.room < 0:
                            problem = "couldn't write file: No space left on device"
                            continue
                    file.write(data)
        except GoneError:
            path.unlink(missing_ok=True)
            raise
        if problem:
            path.unlink()
            self.fail(problem)
        else:
            path.chmod(stat.S_IMODE(int(mode)))
            self.stream.send(b"OKAY" + struct.pack("<I", 0))

    def give(self, _: bytes, name: str) -> None:
        path = Path(name)
        try:
            data = self.daemon.faults.bent.get(path.name) or path.read_bytes()
        except OSError as error:
            self.fail(f"open failed: {error.strerror}")
            return
        for start in range(0, len(data), CHUNK):
            part = data[start : start + CHUNK]
            self.stream.send(b"DATA" + struct.pack("<I", len(part)) + part)
        self.stream.send(b"DONE" + struct.pack("<I", 0))

    def fail(self, message: str) -> None:
        self.stream.send(b"FAIL" + struct.pack("<I", len(message)) + message.encode())
