"""Installs runtimes from a folder of wheels into a virtual environment; stands alone, and is sent to `python3 -` there.

    python3 - VENV WHEELS PACKAGE [PACKAGE ...]

Needs neither internet nor root. Where Python has no ensurepip (Debian without python3-venv), pip's own wheel in the
folder does. Packages that the system has already are used.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import venv


def main(place: str, wheels: str, packages: list[str]) -> int:
    """0, or what pip ends with; a virtual environment that did not become whole is removed."""
    made = not os.path.exists(os.path.join(place, "bin", "python"))
    carried = sorted(glob.glob(os.path.join(wheels, "pip-*.whl")))
    try:
        if made:
            try:
                venv.create(place, system_site_packages=True, with_pip=not carried, symlinks=True)
            except (OSError, subprocess.SubprocessError) as error:
                sys.stderr.write("no virtual environment can be made: %s\n" % error)  # noqa: UP031
                return 3
        pip = [os.path.join(carried[-1], "pip")] if carried else ["-m", "pip"]
        options = ["install", "--quiet", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]
        python = os.path.join(place, "bin", "python")
        done = subprocess.run([python, *pip, *options, "--find-links", wheels, *packages], check=False)
        code = done.returncode
    except BaseException:
        code = 1
        raise
    finally:
        if made and code != 0:
            shutil.rmtree(place, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
