"""Crop, mirror, rotate and resize in one resampling, so that an image is interpolated once."""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medclr.augment.transform import BatchTransform, Params, mix, per_image, put, select, send, turn, uniform

TRIES = 10
"""Crops drawn until one fits into the image, as torchvision's RandomResizedCrop does."""


def crop_box(params: Params, content: Tensor, aspect: tuple[float, float]) -> tuple[Tensor, ...]:
    """Top, left, height and width [n] in pixels of the drawn crops, with torchvision's rounding to whole pixels.

    The first of the ``TRIES`` drawn (area, aspect) that fits is taken. Where none does: the largest centred crop whose
    aspect ratio is allowed.

    Args:
        params: as of ``RandomResizedCrop.sample``.
        content: [n,4], the top, left, height and width in which the crops lie: all of an image, or less padding.
        aspect: the least and the greatest allowed.
    """
    top, left, height, width = content.unbind(1)  # [n] each
    ratio = params["log_aspect"].exp()  # [n,TRIES], width / height
    area = params["area"] * (height * width)[:, None]  # [n,TRIES]
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # [n,TRIES]
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    first = fits.int().argmax(1, keepdim=True)  # [n,1]; 0 where none fits
    found = fits.any(1)
    fallback = (width / height).clamp(*aspect)  # [n]
    h = torch.where(found, h.gather(1, first)[:, 0], height.minimum(width / fallback).round())  # [n]
    w = torch.where(found, w.gather(1, first)[:, 0], width.minimum(height * fallback).round())  # [n]
    free = torch.stack([height - h, width - w], 1)  # [n,2]
    at = torch.where(found[:, None], (params["at"] * (free + 1)).floor().minimum(free), (free / 2).floor())  # [n,2]
    return top + at[:, 0], left + at[:, 1], h, w


def source_matrix(box: tuple[Tensor, ...], params: Params) -> Tensor:
    """Float32 [n,2,3], from where a view shows a point to where in the image it took it, as ``resample`` says.

    Args:
        box: as of ``crop_box``.
        params: as of ``RandomResizedCrop.sample``.
    """
    top, left, h, w = box  # [n] each
    angle = params["rotation_deg"].deg2rad()
    across = torch.stack([angle.cos(), angle.sin()], 1) * (w / 2 * (1 - 2 * params["flip_lr"].float()))[:, None]
    down = torch.stack([-angle.sin(), angle.cos()], 1) * (h / 2 * (1 - 2 * params["flip_ud"].float()))[:, None]
    centre = torch.stack([left + w / 2, top + h / 2], 1)
    return torch.stack([across, down, centre], 2)


def pyramid_level(height: Tensor, width: Tensor, size_px: int) -> Tensor:
    """How often to halve the image before sampling a crop [n] of that many pixels, int64 [n].

    As often as it takes to step over at most 1.5 pixels from sample to sample, so that bilinear interpolation misses
    none: the image pyramid of Williams, Pyramidal Parametrics, SIGGRAPH 1983.
    """
    step = (height * width).sqrt() / size_px
    return (step / 1.5).log2().ceil().clamp(min=0).long()


def resample(images: Tensor, matrix: Tensor, air: Tensor, size_px: int, level: int = 0) -> Tensor:
    """Bilinear sampling of [B,1,H,W] at an affine grid, after averaging blocks of 2**level pixels.

    Args:
        images: [B,1,H,W].
        matrix: [B,2,3], from output (u, v, 1), both in [-1,1] from edge to edge, to source (x, y) in pixels, where
            pixel i covers [i, i+1].
        air: [B], the value outside of the image.
        size_px: rows and columns of the output.
        level: of the image pyramid.

    Returns:
        [B,1,s,s].
    """
    source = images - per_image(air)  # grid_sample pads with zero
    if level:
        source = F.avg_pool2d(source, 2**level, ceil_mode=True)
    height, width = (pixels * 2**level for pixels in source.shape[2:])
    # [B,2] each, in grid_sample's [-1,1]
    across, down, centre = torch.stack([matrix[:, 0] * (2 / width), matrix[:, 1] * (2 / height)], 1).unbind(2)
    u = (torch.arange(size_px, device=images.device) * 2 + 1) / size_px - 1  # [s]
    # One contiguous pass of broadcasting makes the grid: ten times faster than affine_grid.
    first = torch.addcmul((centre - 1)[:, None], across[:, None], u[:, None]).view(-1, 1, 2 * size_px)  # [B,1,2s]
    grid = torch.addcmul(first, u[:, None], down.repeat(1, size_px)[:, None])  # [B,s,2s]
    grid = grid.view(-1, size_px, size_px, 2)
    return F.grid_sample(source, grid, align_corners=False).add_(per_image(air))


def neighbours(first: Tensor, step: Tensor, size_px: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The two pixels of a line between which each of ``size_px`` samples lies, and their weights: [...,s,2] each.

    Args:
        first: [...], where the first sample lies, in pixels; pixel i has its centre at i.
        step: [...], from one sample to the next.
        size_px: s.
        pixels: [...], in the line. Those beyond its ends have weight 0.
    """
    at = first[..., None] + step[..., None] * torch.arange(size_px)  # [...,s]
    below = at.floor()
    index = torch.stack([below, below + 1], -1)  # [...,s,2]
    last = pixels[..., None, None] - 1
    weight = torch.stack([below + 1 - at, at - below], -1) * ((index >= 0) & (index <= last))  # [...,s,2]
    return index.clamp_(min=0).minimum(last).long(), weight


def resample_straight(images: Tensor, lines: Params, size_px: int, level: int = 0) -> Tensor:
    """``resample`` without rotation, on a processor: along the columns, then along the rows.

    Each pass is a weighted sum of two rows of a table, which embedding_bag does in one sweep: several times faster than
    two selections and a sum, than a matrix product, and than grid_sample. Between the passes the image is turned over.

    Args:
        images: [B,1,H,W].
        lines: for ``y`` and ``x`` the ``neighbours`` (``y_index``, ``y_weight``), and what is missing where they lie
            outside of the image, in air (``y_air`` [B,s]).
        size_px: rows and columns of the output.
        level: of the image pyramid.
    """
    source = F.avg_pool2d(images, 2**level, ceil_mode=True) if level else images
    m, _, height, width = source.shape
    image = torch.arange(m)[:, None, None]  # [m,1,1]
    down = mix(source.reshape(m * height, width), image * height + lines["y_index"], lines["y_weight"])  # [m*s,W]
    down = down.view(m, size_px, width).add_(lines["y_air"][:, :, None])
    across = mix(turn(down).flatten(0, 1), image * width + lines["x_index"], lines["x_weight"])  # [m*s,s]
    across = across.view(m, size_px, size_px).add_(lines["x_air"][:, :, None])
    return turn(across)[:, None]


class RandomResizedCrop(BatchTransform):
    """A random crop, perhaps mirrored and slightly rotated, resampled to ``size_px`` x ``size_px`` pixels.

    Area and aspect ratio follow torchvision's RandomResizedCrop: area uniform, log-aspect uniform, the first of ten
    draws that fits, anywhere inside the image with equal chance: inside its content, where it is padded to a square, as
    how much padding a view shows would tell from which scan it is. The crop is rotated about its own centre; what then
    lies outside the image is air.
    """

    facts: ClassVar[tuple[str, ...]] = ("air", "content")

    def __init__(
        self,
        size_px: int,
        area: tuple[float, float] = (0.2, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        rotation_deg: float = 0.0,
        flip_lr: bool = False,
        flip_ud: bool = False,
    ) -> None:
        super().__init__(prob=1.0)
        self.size_px, self.area, self.aspect, self.rotation_deg = size_px, area, aspect, rotation_deg
        self.flip_lr, self.flip_ud = flip_lr, flip_ud

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``area`` (fraction) and ``log_aspect`` [n,10], ``at`` [n,2] in [0,1), ``rotation_deg``, ``flip_*`` [n]."""
        return {
            "area": uniform(R, (n, TRIES), *self.area),
            "log_aspect": uniform(R, (n, TRIES), *np.log(self.aspect)),
            "at": uniform(R, (n, 2), 0, 1),
            "rotation_deg": uniform(R, n, -self.rotation_deg, self.rotation_deg),
            "flip_lr": torch.from_numpy(R.random_sample(n) < 0.5 * self.flip_lr),
            "flip_ud": torch.from_numpy(R.random_sample(n) < 0.5 * self.flip_ud),
        }

    def measure(self, images: Tensor) -> Params:
        """Without a batch that knows better, the darkest pixel is air, and all of the image is content."""
        content = torch.tensor([[0.0, 0.0, *images.shape[2:]]]).expand(len(images), 4)  # [B,4]
        return {"air": images.amin((1, 2, 3)).cpu(), "content": content}

    def prepare(self, params: Params, images: Tensor) -> Params:
        """``matrix`` [B,2,3] and ``air`` [B] as of ``resample``; ``kind`` [B], the level of the pyramid * 2 + straight.

        Where there are images without rotation, on a processor, also the ``lines`` of ``resample_straight``.
        """
        top, left, h, w = crop_box(params, params["content"], self.aspect)  # [B] each
        matrix = source_matrix((top, left, h, w), params)  # [B,2,3]
        level = pyramid_level(h, w, self.size_px)  # [B]
        straight = (params["rotation_deg"] == 0) & (images.device.type == "cpu")  # [B]
        lines: Params = {}
        if straight.any():
            side = 2.0**level  # [B], of an averaged block
            pixels = (torch.tensor(images.shape[:1:-1])[:, None] / side).ceil()  # [2,B], of x and of y
            half, middle = matrix.diagonal(dim1=1, dim2=2).T / side, matrix[:, :, 2].T / side  # [2,B] each
            step = half * (2 / self.size_px)
            index, weight = neighbours(middle - half + step / 2 - 0.5, step, self.size_px, pixels)  # [2,B,s,2] each
            missing = (1 - weight.sum(3)) * params["air"][:, None]  # [2,B,s]
            for i, axis in enumerate("xy"):
                lines |= {f"{axis}_index": index[i], f"{axis}_weight": weight[i], f"{axis}_air": missing[i]}
        air, matrix = send(params["air"], images.device), send(matrix, images.device)
        return {"kind": level * 2 + straight, "matrix": matrix, "air": air, **lines}

    def change(self, images: Tensor, prepared: Params, *, inplace: bool = False) -> Tensor:
        """Resample every image to [B,1,s,s], one pyramid level after the other."""
        kinds = prepared["kind"]
        first = int(kinds[0])
        if bool((kinds == first).all()):
            return self._resample(images, prepared, first)
        out = images.new_empty(len(images), 1, self.size_px, self.size_px)
        for kind in kinds.unique().tolist():
            rows = send((kinds == kind).nonzero()[:, 0], images.device)
            here = {key: value.index_select(0, rows) for key, value in prepared.items() if key != "kind"}
            put(out, rows, self._resample(images.index_select(0, rows), here, kind))
        return out

    def _resample(self, images: Tensor, prepared: Params, kind: int) -> Tensor:
        if kind % 2:
            return resample_straight(images, prepared, self.size_px, kind // 2)
        return resample(images, prepared["matrix"], prepared["air"], self.size_px, kind // 2)

    def describe(self, params: Params, i: int) -> str:
        """Area of the crop as a fraction of a square image, rotation, mirroring."""
        _, _, h, w = crop_box(select(params, slice(i, i + 1)), torch.tensor([[0, 0, 1e4, 1e4]]), self.aspect)
        text = f"crop {float(h * w) / 1e8:.2f} · rot {float(params['rotation_deg'][i]):.0f}°"
        return text + " · lr" * bool(params["flip_lr"][i]) + " · ud" * bool(params["flip_ud"][i])
