"""The command line: each command is a few lines over the pipeline. Documents go to stdout, the rest to stderr."""

from __future__ import annotations

import os
import sys

import typer

from mobilekit.cli import doctor, packing, profiles, reports, sweep
from mobilekit.cli.jobs import app
from mobilekit.cli.terminal import errors
from mobilekit.errors import MobilekitError

__all__ = ["app", "main"]

STOPPED = 130

app.command()(doctor.doctor)
app.command()(packing.pack)
app.command()(packing.unpack)
app.command()(sweep.sweep)
app.add_typer(profiles.app, name="profile")
app.add_typer(reports.app, name="report")


def main() -> None:
    """Run the command line; whatever goes wrong ends in one sentence and an exit code."""
    # torch's idle threads spin by default, which slows down whatever else the machine does, the other threads included
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:  # typer's answer to Ctrl-C in a command
            raise KeyboardInterrupt
        sys.exit(code)
    except MobilekitError as error:
        errors.print(f"mobilekit: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        if error.format_message():  # empty where only the help was printed
            said = f"mobilekit: {error.format_message()} (see mobilekit --help)"
            errors.print(said, style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("mobilekit: stopped; a plan goes on from its last finished stage with --resume", style="red")
        sys.exit(STOPPED)
    except Exception as error:
        if os.environ.get("MOBILEKIT_TRACEBACK"):
            raise
        said = f"mobilekit: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        hint = "(not foreseen: MOBILEKIT_TRACEBACK=1 shows where)"
        errors.print(f"{said} {hint}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
