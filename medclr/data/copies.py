"""Copies in a slice store: slices that are the same, and slices that look the same.

An exact copy has the same stored bytes and the same scale. A near copy looks the same after another export: other
compression, size, grey curve, a rim cut off. It is found by perceptual hashes (Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions", DCT hash): the lowest frequencies of the picture's cosine transform
without the constant row and column, each compared with their median. 8x8 frequencies give 64 bits, in which candidates
are searched; 16x16 give 256 bits, which decide. 64 bits alone cannot: radiographs of different children come as near to
each other as 2 of 64 bits, but not nearer than 44 of 256 (``benchmarks/dedup.py``).

Slices of one scan are neighbours, and series of one study show the same anatomy on purpose (contrast, kernels,
sequences): neither are near copies of each other, unless ``within`` asks for it.

Shape letters: N slices of the store, n compared, m pairs; h rows, w columns of a slice's content.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclr.data.shown import shown
from medclr.data.store import Store
from medclr.progress import progress

DISTANCE = 32
"""Of 256 bits: the widest gap between changed copies and different patients (``benchmarks/dedup.py``)."""

COARSE = 6
"""Candidates differ in at most so many of 64 bits."""

BANDS, EQUAL = COARSE + 3, 3
"""64 bits in so many bands: two hashes that differ in at most COARSE bits have EQUAL whole bands in common."""

FLAT = 0.01
"""A picture in [0,1] whose standard deviation is less shows nothing that a hash could tell apart."""

MOST_PAIRS = 2**22
"""So many pairs are held at once."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Hashes:
    """What is compared of every slice."""

    exact: NDArray[np.uint64]
    """[N,2], BLAKE2b-128 of the stored bytes, scale and offset."""
    coarse: NDArray[np.uint64]
    """[N], 64 bits."""
    fine: NDArray[np.uint64]
    """[N,4], 256 bits."""
    flat: NDArray[np.bool_]
    """[N], nothing is to be seen: no near copy of anything."""


@dataclass(frozen=True)
class Copies:
    """Which slices to leave out, ascending, and which is kept instead of each."""

    slices: Indices
    """[m]."""
    kept: Indices
    """[m]."""
    distance: NDArray[np.int64]
    """[m], bits of 256."""
    exact: NDArray[np.bool_]
    """[m]."""


# Slices -> hashes


def hash_slices(store: Store, chunk: int = 128) -> Hashes:
    """Read every slice once, in the store's order, and hash it."""
    n = len(store)
    found = Hashes(np.zeros((n, 2), np.uint64), np.zeros(n, np.uint64), np.zeros((n, 4), np.uint64), np.zeros(n, bool))

    def work(indices: Indices) -> int:
        rules = np.stack([store.column("scale")[indices], store.column("offset")[indices]], 1)  # [B,2]
        for i, square, rule in zip(indices, store.read(indices), rules, strict=True):  # [S,S], [2]
            digest = hashlib.blake2b(square, digest_size=16)
            digest.update(rule.tobytes())
            found.exact[i] = np.frombuffer(digest.digest(), np.uint64)
        pictures = shown(store, indices)  # [B,S,S]
        sides = [store.column(f"content_{side}")[indices] for side in ("top", "left", "height", "width")]  # 4 times [B]
        boxes, where = np.unique(np.stack(sides, 1), axis=0, return_inverse=True)
        for number, (top, left, height, width) in enumerate(boxes.tolist()):
            mine = where == number
            content = pictures[mine, top : top + height, left : left + width]  # [b,h,w]
            here = indices[mine]
            found.coarse[here], found.fine[here] = perceptual_hashes(content)
            found.flat[here] = content.std((1, 2)) < FLAT
        return len(indices)

    chunks = [np.arange(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    with progress("hashing", n, "slices") as advance, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for done in pool.map(work, chunks):
                advance(done)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def perceptual_hashes(pictures: NDArray[np.float32]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """[b,h,w] -> [b] of 64 bits and [b,4] of 256 bits.

    The transform is taken at the picture's own size: the lowest frequencies of a larger or smaller copy are the same up
    to a factor, so nothing has to be resized, and a factor moves no coefficient across the median.
    """
    height, width = pictures.shape[1:]
    waves = _cosines(height) @ pictures @ _cosines(width).T  # [b,16,16], frequencies 1 to 16
    coarse, fine = _bits(waves[:, :8, :8]), _bits(waves)
    return coarse[:, 0], fine


@cache
def _cosines(n: int) -> NDArray[np.float32]:
    """[16,n], the basis of the DCT-II at frequencies 1 to 16."""
    return np.cos(np.pi * np.outer(np.arange(1, 17), (np.arange(n) + 0.5) / n)).astype(np.float32)


def _bits(waves: NDArray[np.floating[Any]]) -> NDArray[np.uint64]:
    """[b,k,k] -> [b, k*k/64]: which coefficients lie above their median."""
    flat = waves.reshape(len(waves), -1)
    return np.packbits(flat > np.median(flat, axis=1, keepdims=True), axis=1).view(np.uint64)


# Hashes -> copies


def find_copies(store: Store, hashes: Hashes, distance: int = DISTANCE, within: bool = False) -> Copies:
    """Go through the slices, first those to keep: one that repeats a kept slice is left out."""
    scans = store.scans
    late = np.array([scan.split == "train" for scan in scans])
    plain = np.array([not scan.label and not scan.has_mask for scan in scans])
    numbers: dict[str, int] = {}
    study = np.array([numbers.setdefault(s.study_id or s.scan_id, len(numbers)) for s in scans])
    scan = store.column("scan")  # [N]
    order = np.lexsort((np.arange(len(store)), plain[scan], late[scan]))  # [N]
    each = np.arange(len(store))

    kept = exact_copies(hashes.exact[order], (each if within else scan)[order])  # [N] positions in order
    left = order[(kept < 0) & ~hashes.flat[order]]  # [n]
    near = near_copies(hashes.coarse[left], hashes.fine[left], (each if within else study[scan])[left], distance)
    instead = np.full(len(store), -1)
    instead[order[kept >= 0]] = order[kept[kept >= 0]]
    exact = instead >= 0
    instead[left[near >= 0]] = left[near[near >= 0]]
    slices = np.flatnonzero(instead >= 0)
    # What an exact copy repeats may itself be a near copy of a third: then that one is kept.
    root = instead[slices]
    root = np.where(instead[root] >= 0, instead[root], root)
    apart = np.bitwise_count(hashes.fine[slices] ^ hashes.fine[root]).sum(1, dtype=np.int64)
    same = (hashes.exact[slices] == hashes.exact[root]).all(1)
    return Copies(slices, root, apart, exact[slices] & same)


def exact_copies(digests: NDArray[np.uint64], unit: NDArray[Any]) -> Indices:
    """[n,2] digests, in the order of keeping -> [n] the first slice with the same digest, or -1.

    Slices of one ``unit`` [n] are not compared.
    """
    _, first, where = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    earliest = first[where.reshape(-1)]  # [n]
    return np.where(unit[earliest] != unit, earliest, -1)


def near_copies(
    coarse: NDArray[np.uint64], fine: NDArray[np.uint64], unit: NDArray[Any], distance: int, most: int = MOST_PAIRS
) -> Indices:
    """Go through [n] slices in the order of keeping; leave out what is near a kept one.

    Args:
        coarse: [n], 64 bits.
        fine: [n,4], 256 bits.
        unit: [n]; slices of one unit are not compared.
        distance: the most bits of 256.
        most: pairs held at once. Where a crowd of equals has more, fewer slices are compared at a time: the same are
            left out.

    Returns:
        [n] the nearest of the kept slices (in such a crowd, a near one), or -1 for one that is kept itself.
    """
    instead = np.full(len(coarse), -1)
    kept = np.zeros(0, np.int64)
    waiting = [np.arange(len(coarse))]
    while waiting:
        block = waiting.pop()
        for earlier in (kept, None):  # first what repeats the kept ones, then what repeats another of the block
            rest = block[instead[block] < 0]
            here = rest if earlier is None else np.concatenate([earlier, rest])  # [k]
            first = 0 if earlier is None else len(earlier)
            pairs = near_pairs(coarse[here], fine[here], unit[here], distance, first, most)
            if pairs is None:
                waiting += [rest[len(rest) // 2 :], rest[: len(rest) // 2]]
                break
            for i, j in here[np.stack(pairs, 1)].tolist():
                if instead[i] < 0 and instead[j] < 0:  # all that comes before j is decided
                    instead[j] = i
        else:
            kept = np.concatenate([kept, block[instead[block] < 0]])
    return instead


def near_pairs(
    coarse: NDArray[np.uint64], fine: NDArray[np.uint64], unit: NDArray[Any], distance: int, first: int, most: int
) -> tuple[Indices, Indices] | None:
    """All pairs i < j of different units, at most COARSE bits of 64 and ``distance`` bits of 256 apart.

    Hashes that differ in at most COARSE of 64 bits agree in EQUAL of BANDS bands wholly (pigeonhole): so it is enough
    to sort by each choice of EQUAL bands and to look at those that are then equal.

    Args:
        coarse: [n], 64 bits.
        fine: [n,4], 256 bits.
        unit: [n].
        distance: the most bits of 256.
        first: only pairs with i before ``first`` and j from there on; 0: all.
        most: pairs that fit.

    Returns:
        i and j, sorted by j, then by the distance, then by i; None if there are more than ``most``.
    """
    found: list[Indices] = []
    count = 0
    choices = _choices()
    with progress("comparing", len(choices), "passes") as advance:
        for mask, before in choices:
            keys = coarse & mask
            for a, b in _across(keys[:first], keys[first:]) if first else _equal(keys):
                i, j = np.minimum(a, b), np.maximum(a, b)  # [m]
                differing = coarse[i] ^ coarse[j]
                likely = (np.bitwise_count(differing) <= COARSE) & (unit[i] != unit[j])
                for band in before:  # equal there too: an earlier pass has found it
                    likely &= (differing & band) != 0
                i, j = i[likely], j[likely]
                apart = np.bitwise_count(fine[i] ^ fine[j]).sum(1, dtype=np.int64)
                found.append(np.stack([i, j, apart])[:, apart <= distance])
                count += found[-1].shape[1]
                if count > most and len(coarse) > first + 1:
                    return None
            advance(1)
    i, j, apart = np.concatenate([np.zeros((3, 0), np.int64), *found], axis=1)
    order = np.lexsort((i, apart, j))
    return i[order], j[order]


def _equal(keys: NDArray[np.uint64]) -> Iterator[tuple[Indices, Indices]]:
    """Positions [m] and [m] of equal keys; every pair once, a part at a time."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    left = np.arange(len(keys))
    for step in itertools.count(1):
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        if not len(left):
            return
        yield order[left], order[left + step]


def _across(keys: NDArray[np.uint64], others: NDArray[np.uint64]) -> Iterator[tuple[Indices, Indices]]:
    """The same for a key of the first array and one of the second, whose positions count on after the first."""
    order = np.argsort(keys, kind="stable")
    at = np.searchsorted(keys[order], others, "left")
    end = np.searchsorted(keys[order], others, "right")
    other = np.arange(len(others))
    for step in itertools.count():
        other = other[at[other] + step < end[other]]
        if not len(other):
            return
        yield order[at[other] + step], other + len(keys)


@cache
def _choices() -> list[tuple[np.uint64, list[np.uint64]]]:
    """Each choice of EQUAL bands: a mask of their bits, and the bands before its last that it passes over.

    A pair is found by every choice of bands in which it agrees; the first of these agrees in none that it passes over.
    """
    edges = [64 * band // BANDS for band in range(BANDS + 1)]
    bands = [np.uint64(sum(1 << bit for bit in range(a, b))) for a, b in itertools.pairwise(edges)]
    return [
        (np.bitwise_or.reduce([bands[c] for c in choice]), [bands[c] for c in range(choice[-1]) if c not in choice])
        for choice in itertools.combinations(range(BANDS), EQUAL)
    ]
