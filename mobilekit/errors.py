"""The errors that mobilekit raises on purpose: each is one sentence that says what is wrong and what to do."""


class MobilekitError(Exception):
    """Something failed while the job ran (exit code 1)."""

    exit_code = 1


class BadInputError(MobilekitError):
    """The user's input cannot be used (exit code 2)."""

    exit_code = 2


class StorageError(MobilekitError):
    """A result could not be written: the disk is full, read-only or gone (exit code 1)."""


class UnsupportedError(MobilekitError):
    """A runtime, device or lever cannot do what was asked; the message says which and why."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
