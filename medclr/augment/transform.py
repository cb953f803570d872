"""The base of all augmentations: draw the parameters of a whole batch at once, then apply a pure function of them.

Shape letters used in this package: B images of a batch, n parameter sets, H rows, W columns, s output size.
"""

from typing import Any, ClassVar

import numpy as np
import torch
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

    def __init__(self, prob: float = 1.0) -> None:
        super().__init__(prob)
        self.params: Params = {}

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """Parameters of ``n`` images that are changed, each tensor [n,...]."""
        raise NotImplementedError

    def transform(self, images: Tensor, params: Params) -> Tensor:
        """Change every image [B,1,H,W] by its parameters, on one device; the input stays as it is."""
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

    def apply(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """Change the images [B,1,H,W] that are ``on``; only with ``inplace`` may the input be overwritten."""
        on = params["on"].nonzero()[:, 0]
        if len(on) == 0:
            return images
        if len(on) == len(images):
            return self.transform(images, {key: send(value, images.device) for key, value in params.items()})
        here = {key: send(value, images.device) for key, value in select(params, on).items()}
        rows = send(on, images.device)
        changed = self.transform(images.index_select(0, rows), here)
        return (images if inplace else images.clone()).index_copy_(0, rows, changed)

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
