"""What a cell's own process does: `python -m mobilekit.pipeline._sweep_cell FOLDER` carries out FOLDER/cell.json."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from pathlib import Path

from mobilekit import __version__
from mobilekit.errors import MobilekitError, first_line
from mobilekit.files import appearing
from mobilekit.pipeline._sweep_folders import FAILURE, JOB, LOG
from mobilekit.pipeline.listener import Listener
from mobilekit.pipeline.request import Request, open_job
from mobilekit.pipeline.story import Course, tell
from mobilekit.store import MARK
from mobilekit.types import Failure
from mobilekit.types.sweep import CellJob

GRACE_SECONDS = 5.0
"""Between asking a cell to stop and ending it: what it measures in a process of its own is ended by then."""


def carry_out(folder: Path) -> None:
    """Run the job that lies in the folder, or go on with it; an error is kept in failure.json and raised."""
    job = CellJob.model_validate_json((folder / JOB).read_bytes())
    try:
        if job.mobilekit_version != __version__:
            raise MobilekitError(f"this machine has mobilekit {__version__}, the sweep {job.mobilekit_version}")
        request = Request(
            workload=job.workload,
            profile=job.profile,
            budget=job.budget,
            runtime=job.runtime,
            device=job.device,
            seed=job.seed,
            train=job.train,
            train_seconds=job.train_seconds,
        )
        resume = (folder / MARK).exists()
        tell(open_job(request), folder, _logging(), Course(dry=job.dry_run), resume=resume)
    except (Exception, SystemExit) as error:  # a workload may end the program, with code 0 too
        said = str(error) if isinstance(error, MobilekitError) else f"{type(error).__name__}: {first_line(error)}"
        failure = Failure(stage="cell", subject=folder.name, message=said, remedy=f"see {LOG} in its folder")
        with appearing(folder / FAILURE) as draft:
            draft.write_text(failure.model_dump_json(indent=2) + "\n", encoding="utf-8")
        raise


def _logging() -> Listener:
    """Plans and the beginning of each stage, as lines of the log."""
    begun: set[str] = set()

    def progress(stage: str, _fraction: float) -> None:
        if stage not in begun:
            begun.add(stage)
            print(f"stage: {stage}", flush=True)

    return Listener(progress, lambda text: print(text, flush=True))


def end_with_the_sweep() -> None:
    """Stop this process when whoever started it closes its standard input, on purpose or by dying."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs otherwise

    def watch() -> None:
        while os.read(0, 1024):
            pass
        _thread.interrupt_main()
        time.sleep(GRACE_SECONDS)
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with_the_sweep()
    carry_out(Path(sys.argv[1]))
