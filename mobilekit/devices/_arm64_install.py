"""Installs the emulated Arm machine: a small Debian root, the runtimes' wheels, and the counter of instructions."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mobilekit import files
from mobilekit.devices import _arm64_root
from mobilekit.devices._arm64_root import LAYOUT, Installed
from mobilekit.errors import MobilekitError, UnsupportedError, one_line
from mobilekit.interfaces import Progress

TOOLS = {"qemu-aarch64": "qemu-user", "mmdebstrap": "mmdebstrap", "cc": "gcc"}
"""Command -> the Debian package that brings it."""
UNPRIVILEGED = {"fakechroot": "fakechroot", "fakeroot": "fakeroot"}
"""What mmdebstrap needs where it is not root."""
DEBIAN = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
"""Packages of the root; all that they depend on comes with them."""
KEPT = {"": "lib|lib64|usr", "usr": "lib|lib64|bin", "usr/bin": r"python3\.\d+"}
"""Folder of the root -> what stays in it. Whatever is not there is this machine's: none of its programs are run."""
WHEELS = {"numpy": "numpy", "onnx": "onnxruntime", "tflite": "ai-edge-litert"}
OLDEST_GLIBC, NEWEST_GLIBC = 17, 36
"""Of the wheels' platform (manylinux_2_17 and so on); Debian 12 has 2.36."""
CPUINFO = """\
processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""
"""Of one Cortex-A76. Runtimes choose kernels by it; this machine's, of another processor, crashes them."""
SYSTEM = {"possible": "0\n", "present": "0\n", "online": "0\n", "kernel_max": "0\n"}
"""Files of /sys/devices/system/cpu: one CPU, whatever this machine has."""
UNREADABLE = ("sys/class/thermal", "sys/class/powercap", "sys/class/power_supply")
"""Empty folders that hide this machine's: its heat and energy are not those of an Arm processor."""
PROBE = """
import json, numpy, onnxruntime
from ai_edge_litert.interpreter import Interpreter
from importlib.metadata import version
packages = {"numpy": "numpy", "onnx": "onnxruntime", "tflite": "ai-edge-litert"}
print("@@" + json.dumps({name: version(package) for name, package in packages.items()}))
"""
PLUGIN_VERSIONS = range(1, 9)
"""Of QEMU's plugin interface; QEMU 7.2 has 1."""
DOWNLOAD_SECONDS, RUN_SECONDS = 1200.0, 300.0


def install(progress: Progress) -> None:
    """Install everything into the cache, or nothing; what is there already and works stays.

    As root, Debian packages that are missing are installed too. Raises MobilekitError with what to do.
    """
    wanted = wheels()
    found = _arm64_root.installed()
    whole = found is not None and _arm64_root.missing() is None and not found.without_counter
    if found is not None and whole and found.asked == wanted:
        progress(f"emulator: {_arm64_root.folder()} is there ({_words(found)})", 1.0)
        return
    if not sys.platform.startswith("linux"):
        raise UnsupportedError(": ".join(_arm64_root.missing() or ()))
    start = time.monotonic()
    place = _arm64_root.folder()
    progress("emulator: Debian packages", 0.0)
    tools()
    with files.appearing(place) as draft:
        draft.mkdir()
        progress("emulator: Debian root for arm64", 0.1)
        suite = make_root(draft / "root")
        progress("emulator: wheels of the runtimes for arm64", 0.5)
        python = _python_of(draft / "root")
        install_wheels(draft / "packages", python, wanted)
        progress("emulator: first start", 0.7)
        versions = _probe(draft, python)
        progress("emulator: counter of instructions", 0.9)
        reason = build_counter(draft, python)
        made = Installed(
            layout=LAYOUT,
            suite=suite,
            python=python,
            qemu=_arm64_root.qemu_version(_arm64_root.qemu() or ""),
            asked=wanted,
            versions=versions,
            without_counter=reason,
        )
        (draft / "installed.json").write_text(made.model_dump_json(indent=2) + "\n", encoding="utf-8")
    size = sum(path.lstat().st_size for path in place.rglob("*") if not path.is_dir()) / 1e6
    seconds = time.monotonic() - start
    progress(f"emulator: {place}, {size:.0f} MB in {seconds:.0f} s ({_words(made)})", 1.0)


def _words(made: Installed) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(made.versions.items()))
    return f"{made.qemu}, {versions}" + (f"; {made.without_counter}" if made.without_counter else "")


# ---------------------------------------------------------------- programs of this machine


def tools() -> None:
    """Install the programs that are missing, as root. Raises UnsupportedError that says what to install."""
    root = os.geteuid() == 0
    wanted = TOOLS if root else {**TOOLS, **UNPRIVILEGED}
    packages = [package for command, package in wanted.items() if shutil.which(command) is None]
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise UnsupportedError(f"{', '.join(packages)} are missing, and this is no Debian: install them another way")
    if not root:
        if shutil.which("mmdebstrap") and _arm64_root.qemu() and not set(packages) & set(UNPRIVILEGED.values()):
            return  # instructions cannot be counted then, and the result says so
        raise UnsupportedError(f"Debian packages are missing: sudo apt install {' '.join(packages)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "update", "--quiet"], "the lists of Debian packages", environment=quiet)
    command = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages]
    run(command, f"the Debian packages {', '.join(packages)}", environment=quiet)


def run(
    command: Sequence[str],
    what: str,
    seconds: float = DOWNLOAD_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a command prints. Raises MobilekitError with its last line, and what it was for, where it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
            env=None if environment is None else dict(environment),
        )
    except subprocess.TimeoutExpired as error:
        raise MobilekitError(f"{what} took more than {seconds:.0f} s: look at the connection and try again") from error
    except OSError as error:
        raise MobilekitError(f"{what} failed: {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in said if line.startswith(("E:", "ERROR:"))] or said[-1:] or ["no message"]
        raise MobilekitError(f"{what} failed: {Path(command[0]).name}: {one_line(telling[0], 240)}")
    return done.stdout.decode(errors="replace")


# ---------------------------------------------------------------- the root


def make_root(root: Path) -> str:
    """A root for arm64 from the Debian mirror of this machine, with what Python needs; returns its release."""
    suite, mirror = _debian()
    mode = "root" if os.geteuid() == 0 else "fakechroot"
    options = [f"--mode={mode}", "--architectures=arm64", "--variant=extract", f"--include={','.join(DEBIAN)}"]
    run(["mmdebstrap", *options, "--format=directory", suite, str(root), mirror], "the Debian root for arm64")
    for folder, wanted in KEPT.items():
        for path in (root / folder).iterdir():
            if not re.fullmatch(wanted, path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(CPUINFO, encoding="ascii")
    system = root / "sys/devices/system/cpu"
    system.mkdir(parents=True)
    for name, text in SYSTEM.items():
        (system / name).write_text(text, encoding="ascii")
    for name in UNREADABLE:
        (root / name).mkdir(parents=True)
    return suite


def _debian() -> tuple[str, str]:
    """Release and address of the Debian mirror that this machine uses."""
    if shutil.which("apt-get") is None:
        raise UnsupportedError("the emulated machine is made of Debian packages: do this on a Debian system")
    form = "$(ORIGIN)\t$(CODENAME)\t$(COMPONENT)\t$(REPO_URI)"
    for line in run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"], "apt's sources"
    ).splitlines():
        origin, suite, component, mirror = (line.split("\t") + [""] * 4)[:4]
        plain = re.fullmatch(r"[a-z]+", suite) and re.match(r"(?:https?|file):/", mirror)
        if origin == "Debian" and component == "main" and plain:
            return suite, mirror
    raise UnsupportedError(
        "apt knows no Debian mirror: the emulated machine is made of Debian packages (apt-get update)"
    )


def _python_of(root: Path) -> str:
    """The version of its Python: 3.11."""
    found = [
        match[1]
        for path in (root / "usr/bin").glob("python3.*")
        if (match := re.fullmatch(r"python(3\.\d+)", path.name))
    ]
    if not found:
        raise MobilekitError("the Debian root for arm64 has no Python: try again, or report this")
    return found[0]


# ---------------------------------------------------------------- wheels


def wheels() -> dict[str, str]:
    """Runtime name, or numpy -> the version that this machine has, so that outputs are compared between the same
    versions; empty: it has none."""
    found = {}
    for name, package in WHEELS.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def install_wheels(place: Path, python: str, versions: Mapping[str, str]) -> None:
    """Unpack the wheels for arm64, with this machine's pip and its settings.

    Where the version that this machine has was never built for arm64, the newest that was is taken.
    """
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(OLDEST_GLIBC, NEWEST_GLIBC + 1)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--platform=manylinux2014_aarch64", "--implementation=cp", f"--python-version={python}"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", str(place)]
    for name, package in WHEELS.items():
        exact = [f"{package}=={versions[name]}"] if versions[name] else []
        for asked in (*exact, package):
            try:
                run([*command, asked], f"the wheel of {asked} for arm64")
                break
            except MobilekitError:
                if asked == package:
                    raise


def _probe(place: Path, python: str) -> dict[str, str]:
    """Versions as the machine itself tells them: whether it works. Leaves compiled bytecode behind."""
    command = [*_arm64_root.python(place, python), "-c", PROBE]
    said = run(command, "the first start of the emulated machine", RUN_SECONDS, _arm64_root.environment(place))
    versions: dict[str, str] = json.loads(said.partition("@@")[2])
    return versions


# ---------------------------------------------------------------- the counter


def build_counter(place: Path, python: str) -> str:
    """Build QEMU's plugin and try it; why instructions cannot be counted, or an empty string."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "no C compiler is there to build the counter of instructions with (gcc)"
    source = importlib.resources.files("mobilekit.devices").joinpath("_arm64_counter.c").read_bytes()
    code, made = place / "counter.c", place / "counter.so"
    code.write_bytes(source)
    reason = ""
    for version in PLUGIN_VERSIONS:
        options = ["-shared", "-fPIC", "-O2", "-nostdlib", f"-DPLUGIN_VERSION={version}", "-o", str(made), str(code)]
        counts = place / "counts"
        try:
            run([compiler, *options], "building the counter of instructions")
            command = [*_arm64_root.python(place, python, counts), "-c", "pass"]
            run(command, "the counter of instructions", RUN_SECONDS, _arm64_root.environment(place))
        except MobilekitError as error:
            reason = reason or one_line(str(error), 300)
            continue
        finally:
            counted = counts.exists() and any(counts.read_bytes())
            counts.unlink(missing_ok=True)
        if counted:
            return ""
        reason = "the counter of instructions counted nothing"
    made.unlink(missing_ok=True)
    return reason
