"""What scanners and viewers do to grey values: windows, gamma, bias fields, gain, noise, blur; and cut-out.

RandomWindow or PercentileScale maps physical values to [0,1]; what comes after it in a chain keeps [0,1].
Every function below takes images [B,1,H,W] float32 and one parameter set an image. It gives new images, or, with
``inplace``, overwrites the ones it was given, which spares a pass over memory.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medclr.augment.transform import BatchTransform, Params, mix, per_image, turn, uniform
from medclr.scans.modality import Window

BANK = 1 << 20
"""Standard normal values in the noise bank. Noise is a draw of where to read it, so it needs no generator state."""


def _times(images: Tensor, factor: Tensor, inplace: bool) -> Tensor:
    """images * factor, which is ours from then on."""
    return images.mul_(factor) if inplace else images * factor


def scale_to_unit(images: Tensor, low: Tensor, high: Tensor, *, inplace: bool = False) -> Tensor:
    """Map [low, high] [B] to [0,1] and clip; an empty range gives 0 up to it and 1 above."""
    scale = 1 / (high - low).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
    return _times(images, per_image(scale), inplace).add_(per_image(-low * scale)).clamp_(0, 1)


def image_mean(images: Tensor) -> Tensor:
    """Mean of each image [B,1,H,W], [B,1,1,1]."""
    # Rows first: summed at once, the order of the additions would depend on the batch and on the number of threads.
    return images.mean(3, keepdim=True).mean(2, keepdim=True)


def gamma(images: Tensor, exponent: Tensor, *, inplace: bool = False) -> Tensor:
    """x ** exponent [B]: MONAI's AdjustContrast for images that span [0,1]."""
    if images.device.type != "cpu":
        return torch.pow(images, per_image(exponent), out=images if inplace else None)
    images = images if inplace else images.clone()
    # numpy's logarithm takes half the time of torch's, and a pixel's last bit does not hang on where in memory it lies,
    # and so on the rest of the batch, as it does with torch.exp2.
    pixels = images.numpy()
    with np.errstate(divide="ignore"):  # of 0
        np.log(pixels, out=pixels)
    images.mul_(per_image(exponent))
    np.exp(pixels, out=pixels)
    return images


def contrast(images: Tensor, factor: Tensor, brightness: Tensor, *, inplace: bool = False) -> Tensor:
    """factor * (x - mean) + mean + brightness, clipped to [0,1]; factor, brightness [B], mean of each image."""
    shift = image_mean(images) * per_image(1 - factor) + per_image(brightness)  # [B,1,1,1]
    return _times(images, per_image(factor), inplace).add_(shift).clamp_(0, 1)


@lru_cache(maxsize=16)
def legendre(size: int, degree: int, device: torch.device) -> Tensor:
    """Legendre polynomials of degree 0..degree on [-1,1], [degree+1, size]."""
    values = np.polynomial.legendre.legvander(np.linspace(-1, 1, size), degree).T
    return torch.from_numpy(values.astype(np.float32)).to(device)


def bias_field(images: Tensor, coefficients: Tensor) -> Tensor:
    """x * exp(sum_jk c_jk P_j(row) P_k(column)), clipped to [0,1]: the coil sensitivity of MONAI's RandBiasField.

    Args:
        images: [B,1,H,W].
        coefficients: [B,J,K] of the products of Legendre polynomials.
    """
    rows = legendre(images.shape[2], coefficients.shape[1] - 1, images.device)  # [J,H]
    columns = legendre(images.shape[3], coefficients.shape[2] - 1, images.device)  # [K,W]
    field = rows.T @ coefficients @ columns  # [B,H,W]
    return field.exp_()[:, None].mul_(images).clamp_(0, 1)


def gain(images: Tensor, coefficients: Tensor, *, inplace: bool = False) -> Tensor:
    """x * exp(sum_j c_j P_j(row)), clipped to [0,1]: ultrasound time-gain compensation; coefficients [B,J]."""
    polynomials = legendre(images.shape[2], coefficients.shape[1] - 1, images.device)  # [J,H]
    curve = (coefficients[:, :, None] * polynomials).sum(1)  # [B,H]
    return _times(images, curve.exp()[:, None, :, None], inplace).clamp_(0, 1)


@lru_cache(maxsize=4)
def noise_bank(device: torch.device) -> Tensor:
    """The same ``BANK`` standard normal values in every process and run."""
    return torch.randn(BANK, generator=torch.Generator().manual_seed(0)).to(device)


def noise(offset: Tensor, height: int, width: int) -> Tensor:
    """Standard normal fields [B,1,H,W], read from the bank at ``offset`` [B] in [0,1).

    Raises:
        ValueError: an image larger than the bank.
    """
    rows = BANK // width
    if height > rows:
        raise ValueError(f"images of {height} x {width} px are larger than the noise bank of {BANK} values")
    table = noise_bank(offset.device)[: rows * width].view(rows, width)
    first = (offset * (rows - height + 1)).long()  # [B]
    index = first[:, None] + torch.arange(height, device=offset.device)  # [B,H]
    return table.index_select(0, index.flatten()).view(len(offset), 1, height, width)


def gaussian_noise(images: Tensor, std: Tensor, offset: Tensor) -> Tensor:
    """x + std * n."""
    return noise(offset, *images.shape[2:]).mul_(per_image(std)).add_(images)


def rician_noise(images: Tensor, std: Tensor, offset: Tensor, offset_imaginary: Tensor) -> Tensor:
    """sqrt((x + std * n1)**2 + (std * n2)**2), clipped to [0,1]: noise of MR magnitude images (Gudbjartsson 1995)."""
    real = noise(offset, *images.shape[2:]).mul_(per_image(std)).add_(images)
    imaginary = noise(offset_imaginary, *images.shape[2:]).mul_(per_image(std))
    return real.square_().addcmul_(imaginary, imaginary).sqrt_().clamp_(0, 1)


def speckle(images: Tensor, std: Tensor, offset: Tensor) -> Tensor:
    """x * (1 + std * n), clipped to [0,1]: the multiplicative noise of coherent imaging."""
    return noise(offset, *images.shape[2:]).mul_(per_image(std)).add_(1).mul_(images).clamp_(0, 1)


def blur(images: Tensor, sigma: Tensor, radius: int | None = None) -> Tensor:
    """Gaussian blur, sigma [B] in pixels; edge pixels are repeated. One pass down and one across.

    Args:
        images: [B,1,H,W].
        sigma: [B].
        radius: of the kernel in pixels; None, or more than that: SimCLR's, whose side is height // 10, made odd.
    """
    size = max(images.shape[2] // 10 // 2, 1)
    radius = size if radius is None else min(radius, size)
    shifts = torch.arange(-radius, radius + 1, device=sigma.device)  # [k]
    kernel = torch.exp(-0.5 * (shifts / sigma[:, None]) ** 2)  # [B,k]
    kernel = kernel / kernel.sum(1, keepdim=True)
    blurred = _blur_rows(images, kernel) if images.device.type == "cpu" else _blur_shifts(images, kernel)
    return blurred.clamp_(0, 1)  # the weights sum to 1 only up to rounding


def _blur_rows(images: Tensor, kernel: Tensor) -> Tensor:
    """On a processor: weighted sums of rows, of the image and then of the image turned over; kernel [B,k]."""
    n, _, height, width = images.shape
    lines = images.reshape(n, height, width)
    for size in (height, width):
        index = _around(2 ** (n - 1).bit_length(), size, kernel.shape[1])[:n]  # [B,S,k]
        lines = mix(lines.flatten(0, 1), index, kernel[:, None].expand(n, size, -1)).view(lines.shape)
        lines = turn(lines)
    return lines[:, None]


@lru_cache(maxsize=32)
def _around(n: int, size: int, width: int) -> Tensor:
    """For each line of ``n`` images of ``size`` lines the ``width`` lines around it, [n,size,width]."""
    shifts = torch.arange(width) - width // 2
    index = (torch.arange(size)[:, None] + shifts).clamp_(0, size - 1)  # [S,k]
    return index + size * torch.arange(n)[:, None, None]


def _blur_shifts(images: Tensor, kernel: Tensor) -> Tensor:
    """On a GPU: sums of shifted images; kernel [B,k]."""
    radius = kernel.shape[1] // 2
    weights = [per_image(weight) for weight in kernel[:, radius:].unbind(1)]
    for axis, pad in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        size = images.shape[axis]
        wide = F.pad(images, pad, mode="replicate")
        images = wide.narrow(axis, radius, size) * weights[0]
        pair = torch.empty_like(images)
        for shift in range(1, radius + 1):
            torch.add(wide.narrow(axis, radius - shift, size), wide.narrow(axis, radius + shift, size), out=pair)
            images.addcmul_(pair, weights[shift])
    return images


def cutout(images: Tensor, box: Tensor) -> Tensor:
    """Overwrite a rectangle by the mean of its image; box [B,4] is (top, left, bottom, right) in fractions of it."""
    y = (torch.arange(images.shape[2], device=images.device) + 0.5) / images.shape[2]
    x = (torch.arange(images.shape[3], device=images.device) + 0.5) / images.shape[3]
    rows = (y >= box[:, 0, None]) & (y < box[:, 2, None])  # [B,H]
    columns = (x >= box[:, 1, None]) & (x < box[:, 3, None])  # [B,W]
    hole = rows[:, None, :, None] & columns[:, None, None, :]  # [B,1,H,W]
    return torch.where(hole, image_mean(images), images)


class RandomWindow(BatchTransform):
    """One of the clinical windows at random, its width and centre jittered, mapped to [0,1] (PS3.3 C.11.2.1.2).

    Width is multiplied by exp(U(-jitter, jitter)), the centre moves by U(-jitter, jitter) half widths.
    """

    def __init__(self, windows: tuple[Window, ...], jitter: float = 0.2) -> None:
        super().__init__(prob=1.0)
        self.windows, self.jitter = windows, jitter

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``center`` and ``width`` [n], in the modality's unit."""
        which = R.randint(len(self.windows), size=n)
        center = torch.tensor([w.center for w in self.windows], dtype=torch.float32)[which]
        width = torch.tensor([w.width for w in self.windows], dtype=torch.float32)[which]
        center = center + uniform(R, n, -self.jitter, self.jitter) * width / 2
        return {"center": center, "width": width * uniform(R, n, -self.jitter, self.jitter).exp()}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in physical units -> [0,1]."""
        half = params["width"] / 2
        return scale_to_unit(images, params["center"] - half, params["center"] + half, inplace=inplace)

    def describe(self, params: Params, i: int) -> str:
        """Width and centre, as a viewer writes them."""
        return f"W {float(params['width'][i]):.0f} C {float(params['center'][i]):.0f}"


class PercentileScale(BatchTransform):
    """The scan's robust range mapped to [0,1], both ends jittered by U(-jitter, jitter) of the range."""

    facts: ClassVar[tuple[str, ...]] = ("low", "high")

    def __init__(self, jitter: float = 0.05) -> None:
        super().__init__(prob=1.0)
        self.jitter = jitter

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``low_shift`` and ``high_shift`` [n], as fractions of the range."""
        return {key: uniform(R, n, -self.jitter, self.jitter) for key in ("low_shift", "high_shift")}

    def measure(self, images: Tensor) -> Params:
        """Without a batch that knows the scan, the 0.5 and 99.5 percentiles of the image."""
        low, high = images.flatten(1).cpu().quantile(torch.tensor([0.005, 0.995]), dim=1)
        return {"low": low, "high": high}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in any unit -> [0,1]."""
        span = params["high"] - params["low"]
        low = params["low"] + params["low_shift"] * span
        return scale_to_unit(images, low, params["high"] + params["high_shift"] * span, inplace=inplace)

    def describe(self, params: Params, i: int) -> str:
        """Both shifts, in percent of the range."""
        return f"range {float(params['low_shift'][i]):+.0%} {float(params['high_shift'][i]):+.0%}"


class RandomGamma(BatchTransform):
    """x ** exp(U(-log_gamma, log_gamma)); ``invertible``: half of the time on 1 - x.

    With ``invertible`` the distribution is the same for an X-ray and its negative, so neither is learnt.
    """

    def __init__(self, log_gamma: float = 0.5, invertible: bool = False, prob: float = 0.8) -> None:
        super().__init__(prob)
        self.log_gamma, self.invertible = log_gamma, invertible

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``gamma`` [n]; ``inverted`` [n] bool."""
        exponent = uniform(R, n, -self.log_gamma, self.log_gamma).exp()
        return {"gamma": exponent, "inverted": torch.from_numpy(R.random_sample(n) < 0.5 * self.invertible)}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        if not self.invertible:
            return gamma(images, params["gamma"], inplace=inplace)
        sign = per_image(1 - 2 * params["inverted"].float())  # x -> 1 - x is shift + sign * x, and its own inverse
        shift = per_image(params["inverted"].float())
        flipped = _times(images, sign, inplace).add_(shift)
        return gamma(flipped, params["gamma"], inplace=True).mul_(sign).add_(shift)

    def describe(self, params: Params, i: int) -> str:
        """The exponent."""
        return f"γ {float(params['gamma'][i]):.2f}" + " inv" * bool(params["inverted"][i])


class RandomContrast(BatchTransform):
    """Contrast about the mean by exp(U(-contrast, contrast)), and brightness shifted by U(-brightness, brightness)."""

    neutral: ClassVar[Mapping[str, float]] = {"contrast": 1.0, "brightness": 0.0}

    def __init__(self, contrast: float = 0.4, brightness: float = 0.1, prob: float = 0.8) -> None:
        super().__init__(prob)
        self.contrast, self.brightness = contrast, brightness

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``contrast`` and ``brightness`` [n]."""
        factor = uniform(R, n, -self.contrast, self.contrast).exp()
        return {"contrast": factor, "brightness": uniform(R, n, -self.brightness, self.brightness)}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        return contrast(images, params["contrast"], params["brightness"], inplace=inplace)

    def describe(self, params: Params, i: int) -> str:
        """Contrast factor and brightness shift."""
        return f"contrast {float(params['contrast'][i]):.2f} {float(params['brightness'][i]):+.2f}"


class RandomBiasField(BatchTransform):
    """The smooth shading of an MR coil: exp of Legendre polynomials up to ``degree``, coefficients U(-c, c).

    The constant term is left to RandomContrast.
    """

    def __init__(self, coefficient: float = 0.3, degree: int = 3, prob: float = 0.3) -> None:
        super().__init__(prob)
        self.coefficient, self.degree = coefficient, degree

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``coefficients`` [n,degree+1,degree+1], zero beyond the total degree."""
        size = self.degree + 1
        order = np.add.outer(np.arange(size), np.arange(size))
        allowed = torch.from_numpy((order > 0) & (order <= self.degree))
        return {"coefficients": uniform(R, (n, size, size), -self.coefficient, self.coefficient) * allowed}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        return bias_field(images, params["coefficients"])

    def describe(self, params: Params, i: int) -> str:
        """Root of the summed squares of the coefficients."""
        return f"bias {float(params['coefficients'][i].square().sum().sqrt()):.2f}"


class RandomGain(BatchTransform):
    """Brightness that varies smoothly with depth, as the sliders of an ultrasound machine make it."""

    def __init__(self, coefficient: float = 0.3, degree: int = 3, prob: float = 0.5) -> None:
        super().__init__(prob)
        self.coefficient, self.degree = coefficient, degree

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``coefficients`` [n,degree+1] of the Legendre polynomials of depth."""
        return {"coefficients": uniform(R, (n, self.degree + 1), -self.coefficient, self.coefficient)}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        return gain(images, params["coefficients"], inplace=inplace)

    def describe(self, params: Params, i: int) -> str:
        """Root of the summed squares of the coefficients."""
        return f"gain {float(params['coefficients'][i].square().sum().sqrt()):.2f}"


class _RandomNoise(BatchTransform):
    """Noise with a standard deviation drawn from U(0, std), in the unit of the images."""

    def __init__(self, std: float = 0.05, prob: float = 0.5) -> None:
        super().__init__(prob)
        self.std = std

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``std`` [n]; ``offset`` and ``offset_imaginary`` [n], where in the bank the noise is read."""
        draws = {"std": uniform(R, n, 0, self.std)}
        return draws | {key: uniform(R, n, 0, 1) for key in ("offset", "offset_imaginary")}

    def describe(self, params: Params, i: int) -> str:
        """The standard deviation."""
        return f"noise {float(params['std'][i]):.2g}"


class RandomGaussianNoise(_RandomNoise):
    """Additive noise, as an X-ray detector's; clipped to [0,1]."""

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        return gaussian_noise(images, params["std"], params["offset"]).clamp_(0, 1)


class RandomQuantumNoise(_RandomNoise):
    """Additive noise of CT, in Hounsfield units: before the window, so that a narrow one shows more of it."""

    def __init__(self, std: float = 15.0, prob: float = 0.5) -> None:
        super().__init__(std, prob)

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in physical units -> the same."""
        return gaussian_noise(images, params["std"], params["offset"])


class RandomRicianNoise(_RandomNoise):
    """The noise of MR magnitude images: Gaussian in both quadrature channels."""

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        return rician_noise(images, params["std"], params["offset"], params["offset_imaginary"])


class RandomSpeckle(_RandomNoise):
    """Multiplicative noise, as in ultrasound."""

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        return speckle(images, params["std"], params["offset"])

    def describe(self, params: Params, i: int) -> str:
        """The standard deviation."""
        return f"speckle {float(params['std'][i]):.2f}"


class RandomBlur(BatchTransform):
    """Gaussian blur with sigma U(low, high) pixels, drawn for each image (SimCLR's code draws it once a batch)."""

    def __init__(self, sigma_px: tuple[float, float] = (0.1, 2.0), prob: float = 0.5) -> None:
        super().__init__(prob)
        self.sigma_px = sigma_px

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``sigma_px`` [n]."""
        return {"sigma_px": uniform(R, n, *self.sigma_px)}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        # Beyond four sigma there is a weight of 6e-5 in all.
        return blur(images, params["sigma_px"], math.ceil(4 * self.sigma_px[1]))

    def describe(self, params: Params, i: int) -> str:
        """Sigma in pixels."""
        return f"blur {float(params['sigma_px'][i]):.1f}"


class RandomCutout(BatchTransform):
    """One rectangle set to the image's mean: area U(area) of the image, log-aspect U(1/2, 2), anywhere inside it."""

    def __init__(self, area: tuple[float, float] = (0.02, 0.15), prob: float = 0.2) -> None:
        super().__init__(prob)
        self.area = area

    def sample(self, n: int, R: np.random.RandomState) -> Params:
        """``box`` [n,4]: top, left, bottom, right as fractions of the image."""
        area, ratio = uniform(R, n, *self.area), uniform(R, n, -math.log(2), math.log(2)).exp()
        size = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 1).clamp(max=1)  # [n,2]
        corner = uniform(R, (n, 2), 0, 1) * (1 - size)
        return {"box": torch.cat([corner, corner + size], 1)}

    def transform(self, images: Tensor, params: Params, *, inplace: bool = False) -> Tensor:
        """[B,1,H,W] in [0,1] -> the same."""
        return cutout(images, params["box"])

    def describe(self, params: Params, i: int) -> str:
        """The area that is gone."""
        top, left, bottom, right = params["box"][i].tolist()
        return f"cut {(bottom - top) * (right - left):.2f}"
