"""Reasons and irregularities, counted by kind: what differs in numbers and names alone is one."""

import re
from collections import Counter
from collections.abc import Iterable

_PARTICULAR = re.compile(r"'[^']*'|(?<=copy of )\S+|(?<![^\s(),;])(?!--)[^\s(),;]+\.[A-Za-z]\w*|\bf-[0-9a-f]{8,}")
"""A value that was found, or the name of a file: no part of the kind, and not for a page that may be passed on."""


def kinds(texts: Iterable[tuple[str, int]]) -> Counter[str]:
    """(text, how often) -> kinds, with N for every number, the commonest first."""
    counts: Counter[str] = Counter()
    for text, count in texts:
        kind = _PARTICULAR.sub("…", text)
        counts[re.sub(r"(?<!\w)\d+(?:[.,]\d+)*", "N", kind.removeprefix("…: "))] += count
    return Counter(dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))
