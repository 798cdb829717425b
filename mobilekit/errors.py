"""The errors that mobilekit raises on purpose: each is one sentence that says what is wrong and what to do."""

MOST = 390
"""Characters of an error."""


def one_line(text: str, most: int) -> str:
    """A text as one line that any terminal can show; of a longer one than `most` characters the middle is left out.

    >>> one_line("a\\n\\x1b[2J" + 20 * "b", 16)
    'a \\\\x1b[...bbbbb'
    """
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    tail = most // 3
    return line if len(line) <= most else f"{line[: most - tail - 3]}...{line[len(line) - tail :]}"


class MobilekitError(Exception):
    """Something failed while the job ran (exit code 1)."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, whatever names and values from a user's files are in it."""
        return one_line(super().__str__(), MOST)


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
