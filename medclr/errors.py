"""What medclr says when it cannot go on: one sentence naming the file or setting, what is wrong, and what to do.

The command line prints the sentence and leaves with status 2. Everything else that is raised is a bug of ours.
"""


class MedclrError(Exception):
    """Any condition that the user can mend; ``str(error)`` is the one clear sentence."""


def one_line(error: Exception) -> str:
    """What a library says over several lines, to be quoted in a sentence."""
    return " ".join(str(error).split())


class Terminated(KeyboardInterrupt):
    """SIGTERM, a scheduler's request to leave: what is done is saved and the exit status is 0, for a later go."""


class ScanError(MedclrError):
    """A file that is not, or cannot safely become, a scan. Its text is the reason that stands in the rejects."""
