"""What the hashes of ``medclr dedup`` tell apart, and how fast copies are found, against comparing all with all.

    python benchmarks/dedup.py [STORE]

With a store: its slices are changed as an export may change them, and the bits that then differ are printed beside
those between the most alike slices of different patients; of each change, how many of 300 slices are found again. Then,
with and without: the search among random hashes against brute force, and among a million. Exits with status 1 if the
search is not faster than brute force, or if it finds something else.
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclr.data.copies import COARSE, DISTANCE, hash_slices, near_copies, near_pairs, perceptual_hashes
from medclr.data.shown import shown
from medclr.data.store import Store

Picture = Image.Image
SAMPLE = 300
BRUTE = 20_000
MANY = 1_000_000


def jpeg(image: Picture, quality: int) -> Picture:
    """The picture after lossy compression."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def curve(image: Picture, gamma: float) -> Picture:
    """Another grey curve."""
    return image.point([round(255 * (v / 255) ** gamma) for v in range(256)])


def noisy(image: Picture) -> Picture:
    """Noise of 4 % of the range."""
    values = np.asarray(image) + np.random.default_rng(0).normal(0, 10, image.size[::-1])
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def rim(image: Picture, share: float) -> Picture:
    """Cut off at each side."""
    w, h = image.size
    return image.crop((round(share * w), round(share * h), w - round(share * w), h - round(share * h)))


def marked(image: Picture) -> Picture:
    """A white field over a corner, a fiftieth of the picture."""
    changed = image.copy()
    changed.paste(255, (4, 4, 4 + image.width // 7, 4 + image.height // 7))
    return changed


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "JPEG, quality 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "grey curve 0.7": lambda image: curve(image, 0.7),
    "grey curve 1.4": lambda image: curve(image, 1.4),
    "narrower window": lambda image: image.point([max(0, min(255, round((v - 30) * 255 / 190))) for v in range(256)]),
    "noise": noisy,
    "rim of 1 % cut off": lambda image: rim(image, 0.01),
    "turned by 1 degree": lambda image: image.rotate(1, Image.Resampling.BILINEAR),
    "rim of 3 % cut off": lambda image: rim(image, 0.03),
    "a corner marked": marked,
}


def apart(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Bits in which hashes [n,k] and [n,k] differ: [n]."""
    return np.bitwise_count(a ^ b).sum(-1, dtype=np.int64)


def tell_apart(store: Store) -> None:
    """Print the bits that changes make differ, and those between patients."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(store))[:SAMPLE]
    images = [Image.fromarray((255 * picture).astype(np.uint8)) for picture in shown(store, chosen)]

    def hashes(pictures: list[Picture]) -> tuple[NDArray[Any], NDArray[Any]]:
        found = [perceptual_hashes(np.asarray(p, np.float32)[None] / 255) for p in pictures]
        return np.concatenate([coarse for coarse, _ in found])[:, None], np.concatenate([fine for _, fine in found])

    before = hashes(images)
    print(f"{len(images)} slices of {store.path.name}, changed: bits that differ, and how many are found again")
    print(f"  {'':<20} {'of 64: median, most':>22} {'of 256: median, most':>22}   found")
    for name, change in CHANGES.items():
        after = hashes([change(image) for image in images])
        coarse, fine = (apart(a, b) for a, b in zip(before, after, strict=True))
        found = ((coarse <= COARSE) & (fine <= DISTANCE)).mean()
        bits = (f"{np.median(some):15.0f} {some.max():6d}" for some in (coarse, fine))
        print(f"  {name:<20} {' '.join(bits)} {found:7.1%}")

    all_hashes = hash_slices(store)
    patient, n = store.column("patient"), min(len(store), 8000)
    least, candidates = np.full((n, 2), 999), 0
    for i in range(1, n):
        other = (patient[:i] != patient[i]) & (all_hashes.exact[:i] != all_hashes.exact[i]).any(1)
        if other.any():
            coarse = apart(all_hashes.coarse[:i, None][other], all_hashes.coarse[i, None])
            fine = apart(all_hashes.fine[:i][other], all_hashes.fine[i])
            least[i] = coarse.min(), fine.min()
            candidates += int((coarse <= COARSE).sum())
    nearest = np.sort(least, axis=0)[:5].T.tolist()
    print(f"nearest slices of different patients among {n:,}: {nearest[0]} of 64 bits, {nearest[1]} of 256")
    print(f"  pairs at most {COARSE} of 64 bits apart: {candidates:,}; of 256 bits at most {DISTANCE} are allowed")


def brute_force(coarse: NDArray[np.uint64], fine: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Every pair, compared."""
    found = []
    for j in range(1, len(coarse)):
        near = np.flatnonzero(np.bitwise_count(coarse[:j] ^ coarse[j]) <= COARSE)
        found += [(int(i), j) for i in near[apart(fine[near], fine[j]) <= DISTANCE]]
    return found


def random_hashes(n: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """[n] and [n,4], the last hundredth copies of the first with three bits flipped."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (n, 5), dtype=np.uint64)
    copies = n // 100
    words[-copies:] = words[:copies]
    for _ in range(3):
        words[np.arange(n - copies, n), rng.integers(0, 5, copies)] ^= np.uint64(1) << rng.integers(
            0, 64, copies, dtype=np.uint64
        )
    return words[:, 0].copy(), words[:, 1:].copy()


def main() -> int:
    """Measure and print; the exit status."""
    if len(sys.argv) > 1:
        tell_apart(Store(Path(sys.argv[1])))
    times: dict[str, list[float]] = {"brute force": [], "search": []}
    coarse, fine = random_hashes(BRUTE)
    for _ in range(3):
        started = time.perf_counter()
        expected = brute_force(coarse, fine)
        times["brute force"].append(time.perf_counter() - started)
        started = time.perf_counter()
        pairs = near_pairs(coarse, fine, np.arange(BRUTE), DISTANCE, 0, 2**22)
        times["search"].append(time.perf_counter() - started)
    assert pairs is not None
    same = sorted(expected) == sorted(zip(*(side.tolist() for side in pairs), strict=True))
    slow, fast = (float(np.median(values)) for values in times.values())
    print(f"{BRUTE:,} hashes: brute force {slow:.2f} s, search {fast:.2f} s, ratio {slow / fast:.1f}; "
          f"{len(expected)} pairs, {'the same' if same else 'NOT THE SAME'}")  # fmt: skip
    coarse, fine = random_hashes(MANY)
    started = time.perf_counter()
    found = int((near_copies(coarse, fine, np.arange(MANY), DISTANCE) >= 0).sum())
    print(f"{MANY:,} hashes: {time.perf_counter() - started:.0f} s, {found:,} of {MANY // 100:,} copies found")
    return int(not same or slow < fast)


if __name__ == "__main__":
    sys.exit(main())
