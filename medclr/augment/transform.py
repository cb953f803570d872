"""The base of all augmentations: draw the parameters of a whole batch at once, then apply a pure function of them.

Shape letters used in this package: B images of a batch, n parameter sets, H rows, W columns, s output size.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import RandomizableTransform
from monai.utils import TransformBackends, convert_to_tensor
from torch import Tensor

Params = dict[str, Tensor]
"""One row an image in every tensor, on the CPU; ``on`` [n] bool says which images are changed at all."""


def select(params: Params, rows: Tensor | slice) -> Params:
    """The parameter sets of some images."""
    return {key: value[rows] for key, value in params.items()}


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on the images' device, without waiting for what a GPU still has to do."""
    return values.to(device, non_blocking=True)


def per_image(values: Tensor) -> Tensor:
    """[B] -> [B,1,1,1], to meet images [B,1,H,W]."""
    return values[:, None, None, None]


def uniform(R: np.random.RandomState, n: int | tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform float32 draws in [low, high)."""
    return torch.from_numpy(R.uniform(low, high, n).astype(np.float32))


def mix(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows of ``table`` [r,c] on a processor: index and weight [m,s,k] -> [m*s,c].

    embedding_bag does it in one sweep: several times faster than selections and a sum, or than a matrix product.
    """
    return F.embedding_bag(index.flatten(0, 1), table, mode="sum", per_sample_weights=weight.flatten(0, 1))


def turn(images: Tensor) -> Tensor:
    """[m,H,W] on a processor -> [m,W,H], copied by numpy, which takes half the time of torch."""
    pixels = images.numpy()
    if images.shape[2] > 64 and images.shape[2] % 64 == 0:
        # The pixels of a column would all compete for the same few lines of the cache: twice as long as with this copy.
        wide = np.empty((*images.shape[:2], images.shape[2] + 16), pixels.dtype)[:, :, :-16]
        wide[...] = pixels
        pixels = wide
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 2, 1)))


def put(images: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Overwrite some images; on a processor by numpy, four times as fast as index_copy_."""
    if images.device.type != "cpu":
        return images.index_copy_(0, rows, values)
    images.numpy()[rows.numpy()] = values.numpy()
    return images


CACHED = 1 << 20
"""Pixels of slices that are made into views together on a processor, so that what one pass has written is still in the
cache when the next one reads it. With fewer, what a call costs counts; with more, memory does."""


def block_size(images: Tensor) -> int:
    """How many images [B,C,H,W] to work on together: on a GPU all, on a processor as many as fit its cache."""
    return len(images) if images.device.type != "cpu" else max(1, CACHED // images[0].numel())


class BatchTransform(RandomizableTransform):
    """A random change of [B,1,H,W] images, every image with its own parameters and no loop over the batch.

    ``draw`` is the only random part and ``apply`` is a pure function, so a view is replayed from its recorded
    parameters, and every process of a run can draw for the global batch and keep its own rows. A subclass gives
    ``sample`` (what is drawn), ``transform`` (a deterministic function of images and parameters) and ``describe``.

    Called on one [1,H,W] image, it is an ordinary MONAI transform; ``params`` holds what was drawn last.
    """

    backend: ClassVar[list[TransformBackends]] = [TransformBackends.TORCH]

    facts: ClassVar[tuple[str, ...]] = ()
    """What ``transform`` must know of each scan besides its pixels: names of per-image columns of the batch."""

    neutral: ClassVar[Mapping[str, float]] = {}
    """Parameters that leave an image as it is, to the bit. Where there are any, images that are not ``on`` go through
    ``transform`` too: for one or two passes that is cheaper than to take the others out and put them back."""

    takes_all: ClassVar[bool] = False
    """Whether it wants all images at once, and not block by block."""

    def __init__(self, prob: float = 1.0) -> None:
        super().__init__(prob)
        self.params: Params = {}

    @property
    def key(self) -> str:
        """Its name, from which its draws follow."""
        return type(self).__name__

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """Parameters of ``n`` images that are changed, each tensor [n,...]."""
        raise NotImplementedError

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """Change every image [B,1,H,W] by its parameters, on one device; only with ``inplace`` may the input change."""
        raise NotImplementedError

    def measure(self, images: Tensor) -> Params:
        """The ``facts`` from the pixels alone, for callers that have no batch around the image."""
        return {}

    def describe(self, params: Params, i: int) -> str:
        """What was done to image ``i``, in a few characters."""
        raise NotImplementedError

    def draw(self, n: int, R: np.random.RandomState) -> Params:
        """Parameters of ``n`` images, including the decision whether an image is changed (``prob``)."""
        on = torch.from_numpy(R.random_sample(n) < self.prob)
        return {"on": on, **self.sample(n, R)}

    def prepare(self, params: Params, images: Tensor) -> Params:
        """What ``change`` needs, worked out for any number of images at once: one row an image, ``on`` on the CPU.

        Args:
            params: of the images.
            images: [B,1,H,W]; only where they lie and how large they are may matter.
        """
        if self.neutral:
            on = params["on"]
            params = params | {key: torch.where(on, params[key], value) for key, value in self.neutral.items()}
        return {key: value if key == "on" else send(value, images.device) for key, value in params.items()}

    def change(self, images: Tensor, prepared: Params, *, inplace: bool = False) -> Tensor:
        """Change the images [B,1,H,W] that are ``on``; only with ``inplace`` may the input be overwritten."""
        rows = prepared["on"].nonzero()[:, 0]
        if len(rows) == 0:
            return images
        if self.neutral or len(rows) == len(images):
            return self.transform(images, prepared, inplace=inplace)
        rows = send(rows, images.device)
        here = {key: value.index_select(0, rows) for key, value in prepared.items() if key != "on"}
        changed = self.transform(images.index_select(0, rows), here, inplace=True)
        return put(images if inplace else images.clone(), rows, changed)

    def apply(self, images: Tensor, params: Params) -> Tensor:
        """Change the images [B,1,H,W] that are ``on``; the input stays as it is."""
        return run((self,), images, (params,))

    def randomize(self, data: Tensor) -> None:
        """Draw parameters for [B,1,H,W] images from this transform's own random state."""
        self.params = {**self.draw(len(data), self.R), **self.measure(data)}

    def __call__(self, img: Any, randomize: bool = True) -> Tensor:
        """Change [1,H,W] or [B,1,H,W]; with ``randomize=False`` by the parameters of the call before.

        Raises:
            ValueError: another shape, or more than one channel.
        """
        images = convert_to_tensor(img, dtype=torch.float32, track_meta=False)
        single = images.ndim == 3
        images = images[None] if single else images  # [B,1,H,W]
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"expected [1,H,W] or [B,1,H,W], got {list(img.shape)}")
        if randomize:
            self.randomize(images)
        images = self.apply(images, self.params)
        return images[0] if single else images


def run(chain: Sequence[BatchTransform], images: Tensor, params: Sequence[Params]) -> Tensor:
    """One transform after the other, by recorded parameters: [B,1,H,W] -> [B,1,H',W']; the input stays as it is."""
    for takes_all, steps in groupby(zip(chain, params, strict=True), key=lambda step: step[0].takes_all):
        part, drawn = zip(*steps, strict=True)
        images = _run(part, images, drawn, len(images) if takes_all else block_size(images))
    return images


def _run(chain: Sequence[BatchTransform], images: Tensor, params: Sequence[Params], size: int) -> Tensor:
    """So many images at a time."""
    prepared = [transform.prepare(drawn, images) for transform, drawn in zip(chain, params, strict=True)]
    if size >= len(images):
        return _run_block(chain, images, prepared)
    pieces = [{key: value.split(size) for key, value in everything.items()} for everything in prepared]
    out: Tensor | None = None
    for i, block in enumerate(images.split(size)):
        made = _run_block(chain, block, [{key: value[i] for key, value in piece.items()} for piece in pieces])
        if out is None:
            out = made.new_empty(len(images), *made.shape[1:])
        out[i * size : i * size + len(made)] = made
    assert out is not None, "a batch has images"
    return out


def _run_block(chain: Sequence[BatchTransform], images: Tensor, prepared: Sequence[Params]) -> Tensor:
    is_ours = False
    for transform, values in zip(chain, prepared, strict=True):
        before, images = images, transform.change(images, values, inplace=is_ours)
        is_ours |= images is not before
    return images
