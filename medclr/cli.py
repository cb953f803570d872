"""The command line: a verb is the function of the same name, and its signature is its options.

Nothing heavy is imported before the verb is known: ``medclr --help`` answers at once.
"""

import errno
import importlib
import os
import select
import signal
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medclr.errors import MedclrError, Terminated


@dataclass(frozen=True)
class Verb:
    """One row of the command line."""

    module: str
    """Module that holds a function of the verb's name, and the function's own parser if it has ``options``."""

    help: str
    """One line for ``medclr --help``."""

    positional: str = ""
    """Name of the parameter that is given without ``--``."""

    resumes: bool = False
    """Whether the same command goes on where it was interrupted; the others start anew."""


VERBS = {
    "index": Verb("medclr.data.index", "find the scans in folders and write a manifest", positional="roots"),
    "whereis": Verb("medclr.data.whereis", "which file an opaque id stands for", positional="ids"),
    "rekey": Verb("medclr.data.rekey", "write a manifest again under a new key", positional="manifest"),
    "prepare": Verb(
        "medclr.data.prepare", "decode each scan once into a slice store", positional="manifest", resumes=True
    ),
    "verify": Verb("medclr.data.store", "check a slice store against what was written", positional="store"),
    "dedup": Verb(
        "medclr.data.dedup", "find slices that repeat others, and write which to leave out", positional="store"
    ),
    "describe": Verb("medclr.describe", "what is in a manifest or a store, as tables and a page", positional="cohort"),
    "plan": Verb("medclr.plan", "what a pretraining will take: time, memory, disk, and the batch that fits"),
    "pretrain": Verb("medclr.pretrain", "train an encoder on unlabelled slices (SimCLR)", resumes=True),
    "finetune": Verb("medclr.finetune", "train a model on a few labelled cases, and score it", resumes=True),
    "predict": Verb(
        "medclr.predict", "ask a trained model about new scans: scores, or masks", positional="scans", resumes=True
    ),
    "distill": Verb("medclr.distill", "train a smaller student on a teacher's opinion", resumes=True),
    "probe": Verb("medclr.probe", "score frozen features with few labelled patients"),
    "compare": Verb("medclr.compare", "pretrained encoders with few labels, on the same patients", resumes=True),
    "embed": Verb("medclr.embed", "write features as a table, and a picture of them"),
    "demo": Verb("medclr.demo", "the whole road on a cohort of phantom patients"),
}


def usage() -> str:
    """The text of ``medclr --help``."""
    rows = "\n".join(f"  {name:<10} {verb.help}" for name, verb in VERBS.items())
    return (
        "usage: medclr VERB [options]\n\n"
        "From a folder of unlabelled scans to a model that works with a few labelled cases.\n\n"
        f"{rows}\n\n"
        "medclr VERB --help explains the options of a verb; medclr --version says which medclr this is."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done or saved at SIGTERM, 2 what the user can mend, 130 after Ctrl-C, 141
    if nobody reads what it says.
    """
    try:
        try:
            return _command(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 128 + signal.SIGPIPE


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        import medclr

        print(f"medclr {medclr.__version__}")
        return 0
    speaks = os.environ.get("RANK", "0") == "0"  # what all processes of a run would say, its first one says
    signal.signal(signal.SIGTERM, _terminate)  # a batch system's stop is a Ctrl-C: save and leave
    try:
        result = _run(words[0], words[1:])
        if result is not None and speaks:
            print(result)
    except MedclrError as error:
        if speaks:
            print(f"medclr: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print("medclr: the disk is full; free some space and run the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        resumes = words[0] in VERBS and VERBS[words[0]].resumes
        again = "; the same command again goes on" if resumes else ""
        if speaks:
            print(f"medclr: {str(interruption) or f'interrupted{again}'}", file=sys.stderr)
        return 0 if resumes and isinstance(interruption, Terminated) else 130
    return 0


def _nobody_reads() -> bool:
    """Whether standard output or error was closed, as by ``medclr ... | head``; what is still unsaid is dropped."""
    closed = []
    for stream in (sys.stdout, sys.stderr):
        poll = select.poll()
        poll.register(stream, 0)  # errors are always told
        if poll.poll(0):
            closed.append(stream)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(closed)


def _terminate(signum: int, frame: types.FrameType | None) -> None:
    raise Terminated


def _run(name: str, arguments: list[str]) -> Any:
    from medclr.config import nearest, option_parser, parse

    if name not in VERBS:
        raise MedclrError(f"unknown verb {name!r}{nearest(name, list(VERBS))}")
    verb = VERBS[name]
    module = importlib.import_module(verb.module)
    if hasattr(module, "command"):  # a verb whose options depend on other options parses them itself
        return module.command(arguments)
    function: Callable[..., Any] = getattr(module, name)
    summary = (function.__doc__ or verb.help).split("\n\n")[0]

    def add(parser: Any) -> None:
        from inspect import signature
        from typing import get_args, get_origin

        from docstring_parser import parse as parse_docstring

        helps = {told.arg_name: told.description for told in parse_docstring(function.__doc__ or "").params}
        parameters = signature(function).parameters
        by_hand = [n for n, p in parameters.items() if n == verb.positional or get_origin(p.annotation) is list]
        parser.add_function_arguments(function, as_positional=False, skip=set(by_hand))
        for parameter in map(parameters.__getitem__, by_hand):  # a list is given as words: --budgets 5 10%
            several = get_origin(parameter.annotation) is list
            kind = get_args(parameter.annotation)[0] if several else parameter.annotation
            options: dict[str, Any] = {"type": kind, "help": helps[parameter.name]}
            options |= {"nargs": "+"} if several else {}
            if parameter.name == verb.positional:
                parser.add_argument(parameter.name, **options)
            else:
                parser.add_argument(f"--{parameter.name}", default=parameter.default, **options)

    return function(**parse(option_parser(f"medclr {name}", summary, add), arguments))


if __name__ == "__main__":
    sys.exit(main())
