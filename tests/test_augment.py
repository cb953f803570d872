"""Every transform keeps one contract; each deterministic function agrees with an independent reference."""

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import AdjustContrast, Compose, GaussianSmooth, RandBiasField, ScaleIntensityRange
from numpy.typing import NDArray
from scipy import ndimage, stats
from torch import Tensor

from medclr import augment
from medclr.augment import TRANSFORMS, geometry, intensity
from medclr.augment.geometry import RandomResizedCrop, crop_box, pyramid_level, resample
from medclr.augment.intensity import PercentileScale, RandomQuantumNoise, RandomWindow
from medclr.augment.single import MonaiTransforms
from medclr.augment.transform import BatchTransform, Params, select
from medclr.scans.modality import MODALITIES, Window

WINDOWS = MODALITIES["CT"].windows
SCALING = (RandomWindow, PercentileScale)
OPTIONAL = [kind for kind in TRANSFORMS if "prob" in inspect.signature(kind).parameters]
"""The others are always applied: the steps after them rely on it."""
EVERY = (*TRANSFORMS, MonaiTransforms)
"""And those of MONAI, which a chain of the user's own may hold."""
PHYSICAL = (RandomResizedCrop, RandomQuantumNoise)
"""These take physical values and give physical values."""


def make(kind: type[BatchTransform], prob: float = 0.7) -> BatchTransform:
    """A transform that does something to most images."""
    if kind is RandomResizedCrop:
        return RandomResizedCrop(24, rotation_deg=15, flip_lr=True, flip_ud=True)
    if kind is RandomWindow:
        return RandomWindow(WINDOWS)
    if kind is MonaiTransforms:
        return MonaiTransforms([{"name": "RandGaussianNoise", "prob": 1.0}], is_scaled=True)
    return kind(prob=prob) if kind in OPTIONAL else kind()


def images_for(kind: type[BatchTransform], n: int = 6, height: int = 40, width: int = 31) -> Tensor:
    """Smooth images with some noise: physical values for geometry and scaling, [0,1] for the rest."""
    R = np.random.RandomState(7)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.sin(9 * y[None] * R.rand(n, 1, 1) + 7 * x * R.rand(n, 1, 1) + R.rand(n, 1, 1)) + 0.1 * R.randn(n, 1, 1)
    unit = (waves - waves.min((1, 2), keepdims=True)) / np.ptp(waves, axis=(1, 2), keepdims=True)
    images = torch.from_numpy(unit[:, None].astype(np.float32))
    return images * 1500 - 1000 if kind in (*SCALING, *PHYSICAL) else images


def drawn(transform: BatchTransform, images: Tensor, seed: int = 0) -> Params:
    return {**transform.draw(len(images), np.random.RandomState(seed)), **transform.measure(images)}


def test_the_list_of_transforms_is_complete() -> None:
    found = {
        value
        for module in (geometry, intensity)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, BatchTransform) and not name.startswith("_")
    }
    assert found - {BatchTransform} == set(TRANSFORMS)
    assert augment.__all__ == [kind.__name__ for kind in TRANSFORMS]


@pytest.mark.parametrize("kind", EVERY)
class TestContract:
    def test_shape_dtype_range_and_input(self, kind: type[BatchTransform]) -> None:
        transform, images = make(kind), images_for(kind)
        before = images.clone()
        out = transform.apply(images, drawn(transform, images))
        assert torch.equal(images, before), "apply overwrote its input"
        assert out.dtype == torch.float32
        assert out.isfinite().all()
        assert out.shape == ((6, 1, 24, 24) if kind is RandomResizedCrop else images.shape)
        low, high = (before.min() - 75, before.max() + 75) if kind in PHYSICAL else (0.0, 1.0)
        assert low <= float(out.min())
        assert float(out.max()) <= high

    def test_changes_the_images_that_are_on_and_only_those(self, kind: type[BatchTransform]) -> None:
        transform, images = make(kind), images_for(kind)
        params = drawn(transform, images)
        if kind not in OPTIONAL:
            assert params["on"].all()
            return
        params["on"] = torch.tensor([True, False, True, False, False, True])
        out = transform.apply(images, params)
        changed = (out != images).flatten(1).any(1)
        assert torch.equal(changed, params["on"])
        assert torch.equal(out[params["on"]], transform.transform(images[params["on"]], select(params, params["on"])))

    def test_seeds(self, kind: type[BatchTransform]) -> None:
        images = images_for(kind)
        one, same, other = (make(kind).set_random_state(seed)(images) for seed in (3, 3, 4))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_replay(self, kind: type[BatchTransform]) -> None:
        transform, images = make(kind).set_random_state(1), images_for(kind)
        first = transform(images)
        recorded = transform.params
        assert torch.equal(transform(images, randomize=False), first)
        assert torch.equal(transform.apply(images, recorded), first)
        assert not torch.equal(transform(images), first)

    def test_one_image_in_a_monai_compose(self, kind: type[BatchTransform]) -> None:
        image = images_for(kind)[0]  # [1,H,W]
        chain = Compose([make(kind)]).set_random_state(seed=5)
        out = chain(MetaTensor(image))
        assert out.ndim == 3
        assert torch.equal(out, Compose([make(kind)]).set_random_state(seed=5)(image.numpy()))

    def test_an_image_is_changed_alike_alone_and_in_a_batch(self, kind: type[BatchTransform]) -> None:
        transform, images = make(kind), images_for(kind)
        params = drawn(transform, images)
        together = transform.apply(images, params)
        for i in range(len(images)):
            alone = transform.apply(images[i : i + 1], select(params, slice(i, i + 1)))
            assert torch.equal(alone[0], together[i])

    def test_memory_layout_does_not_matter(self, kind: type[BatchTransform]) -> None:
        transform, images = make(kind), images_for(kind)
        params = drawn(transform, images)
        strided = images.transpose(2, 3).contiguous().transpose(2, 3)
        assert not strided.is_contiguous()
        torch.testing.assert_close(transform.apply(strided, params), transform.apply(images, params))

    def test_constant_images(self, kind: type[BatchTransform]) -> None:
        transform, images = make(kind), torch.full((4, 1, 20, 30), 0.5)
        assert transform(images).isfinite().all()

    def test_strangers_are_refused(self, kind: type[BatchTransform]) -> None:
        for shape in ((20, 30), (3, 20, 30), (2, 3, 20, 30)):
            with pytest.raises(ValueError, match=r"expected \[1,H,W\] or \[B,1,H,W\]"):
                make(kind)(torch.rand(shape))

    def test_caption(self, kind: type[BatchTransform]) -> None:
        transform, images = make(kind), images_for(kind)
        params = drawn(transform, images)
        captions = [transform.describe(params, i) for i in range(len(images))]
        assert len(set(captions)) > 2, "each image has its own parameters"
        assert all(0 < len(caption) < 40 for caption in captions)


@pytest.mark.parametrize("kind", OPTIONAL)
def test_probability_zero_is_the_identity(kind: type[BatchTransform]) -> None:
    images = images_for(kind)
    assert torch.equal(make(kind, prob=0.0)(images), images)
    assert not torch.equal(make(kind, prob=1.0)(images), images)


# ---- geometry


def torchvision_crop(
    height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], R: np.random.RandomState
) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision 0.22, one image at a time."""
    for _ in range(10):
        target = height * width * R.uniform(*area)
        ratio = np.exp(R.uniform(*np.log(aspect)))
        w, h = round(np.sqrt(target * ratio)), round(np.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return R.randint(0, height - h + 1), R.randint(0, width - w + 1), h, w
    w, h = width, height
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("height", "width", "area"), [(96, 96, (0.08, 1.0)), (60, 100, (0.5, 1.0)), (30, 120, (0.9, 1.0))]
)
def test_crops_are_distributed_as_in_torchvision(height: int, width: int, area: tuple[float, float]) -> None:
    n, aspect = 3000, (3 / 4, 4 / 3)
    params = RandomResizedCrop(64, area=area).draw(n, np.random.RandomState(0))
    content = torch.tensor([[7.0, 20.0, height, width]]).expand(n, 4)
    ours = torch.stack(crop_box(params, content, aspect), 1).numpy() - [7, 20, 0, 0]  # [n,4]
    R = np.random.RandomState(1)
    theirs = np.array([torchvision_crop(height, width, area, aspect, R) for _ in range(n)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_crop_parameters_follow_their_distributions() -> None:
    n = 4000
    transform = RandomResizedCrop(64, area=(0.2, 0.5), rotation_deg=15, flip_lr=True)
    params = transform.draw(n, np.random.RandomState(0))
    _, _, h, w = crop_box(params, torch.tensor([[0, 0, 1e6, 1e6]]).expand(n, 4), transform.aspect)
    assert stats.kstest((h * w).numpy() / 1e12, stats.uniform(0.2, 0.3).cdf).pvalue > 0.01  # all of them fit
    log_aspect = stats.uniform(np.log(3 / 4), np.log(16 / 9))
    assert stats.kstest(np.log(w.numpy() / h.numpy()), log_aspect.cdf).pvalue > 0.01
    assert stats.kstest(params["rotation_deg"].numpy(), stats.uniform(-15, 30).cdf).pvalue > 0.01
    assert stats.binomtest(int(params["flip_lr"].sum()), n, 0.5).pvalue > 0.01
    assert not params["flip_ud"].any()


def slow_resample(
    image: NDArray[np.float64],
    box: NDArray[np.float64],
    degrees: float,
    lr: bool,
    ud: bool,
    air: float,
    size: int,
    level: int,
) -> NDArray[np.float64]:
    """The crop by scipy, in float64, from the words of the docstring."""
    side = 2**level
    height, width = (-(-n // side) for n in image.shape)
    pooled = np.array(
        [
            [image[i * side : (i + 1) * side, j * side : (j + 1) * side].mean() for j in range(width)]
            for i in range(height)
        ]
    )
    top, left, h, w = box
    t = (np.arange(size) + 0.5) / size - 0.5
    v, u = np.meshgrid(-t if ud else t, -t if lr else t, indexing="ij")
    angle = np.deg2rad(degrees)
    x = left + w / 2 + np.cos(angle) * u * w - np.sin(angle) * v * h
    y = top + h / 2 + np.sin(angle) * u * w + np.cos(angle) * v * h
    at = np.stack([y / side - 0.5, x / side - 0.5])  # pixel 0 has its centre at half a pixel
    return ndimage.map_coordinates(pooled, at, order=1, mode="grid-constant", cval=air)


@pytest.mark.parametrize(("height", "width", "size"), [(40, 40, 32), (37, 52, 48), (90, 70, 16), (40, 128, 80)])
@pytest.mark.parametrize("rotation_deg", [0, 30])
def test_resampling_agrees_with_scipy(height: int, width: int, size: int, rotation_deg: int) -> None:
    n = 12
    images = torch.rand(n, 1, height, width, generator=torch.Generator().manual_seed(0)) * 2000 - 1000
    transform = RandomResizedCrop(size, area=(0.1, 1.0), rotation_deg=rotation_deg, flip_lr=True, flip_ud=True)
    params = drawn(transform, images, seed=2) | {"air": torch.linspace(-1024, 0, n)}
    out = transform.apply(images, params)
    box = torch.stack(crop_box(params, params["content"], transform.aspect), 1)
    levels = pyramid_level(box[:, 2], box[:, 3], size)
    if size == 16:
        assert set(levels.tolist()) >= {1, 2}
    for i in range(n):
        expected = slow_resample(
            images[i, 0].double().numpy(),
            box[i].double().numpy(),
            float(params["rotation_deg"][i]),
            bool(params["flip_lr"][i]),
            bool(params["flip_ud"][i]),
            float(params["air"][i]),
            size,
            int(levels[i]),
        )
        assert np.abs(out[i, 0].numpy() - expected).max() < 2000 * 1e-4


def test_straight_and_rotated_images_of_a_batch_do_not_matter_to_each_other() -> None:
    images = images_for(RandomResizedCrop, n=9, height=64, width=64)
    transform = RandomResizedCrop(16, area=(0.1, 1.0), flip_lr=True)  # of several levels of the pyramid
    params = drawn(transform, images) | {"rotation_deg": torch.tensor([0.0, 0, 0, 0, 0, 0, 5, 6, 7])}
    together = transform.apply(images, params)
    for i in range(9):
        assert torch.equal(transform.apply(images[i : i + 1], select(params, slice(i, i + 1)))[0], together[i])
    a_little = params | {"rotation_deg": params["rotation_deg"].clamp(min=1e-4)}
    torch.testing.assert_close(transform.apply(images, a_little), together, atol=0.5, rtol=0)  # of 1500


def test_the_whole_image_at_its_own_size_is_unchanged() -> None:
    images = torch.rand(3, 1, 32, 32)
    transform = RandomResizedCrop(32, area=(1.0, 1.0), aspect=(1.0, 1.0))
    torch.testing.assert_close(transform(images), images, atol=1e-5, rtol=0)


def test_padding_changes_nothing() -> None:
    """Images of several sizes, padded with air to one square, give the views of the images themselves."""
    transform = RandomResizedCrop(24, area=(0.1, 1.0), rotation_deg=30, flip_lr=True, flip_ud=True)
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[8, 16, 32, 24], [0, 0, 64, 40], [30, 2, 20, 60], [24, 24, 16, 16]])
    params = transform.draw(len(boxes), np.random.RandomState(3)) | {"air": torch.full((4,), -1024.0)}
    square = torch.full((4, 1, 64, 64), -1024.0)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        image = torch.rand(1, 1, height, width, generator=generator) * 2000 - 1000
        square[i, :, top : top + height, left : left + width] = image[0]
        alone = {name: value[i : i + 1] for name, value in params.items()}
        alone["content"] = torch.tensor([[0.0, 0.0, height, width]])
        expected = transform.apply(image, alone)
        found = transform.apply(square[i : i + 1], alone | {"content": boxes[i : i + 1].float()})
        torch.testing.assert_close(found, expected, atol=0.2, rtol=0)
    together = transform.apply(square, params | {"content": boxes.float()})
    torch.testing.assert_close(together[i : i + 1], found, atol=0.2, rtol=0)


def test_outside_is_air() -> None:
    transform = RandomResizedCrop(64, area=(1.0, 1.0), aspect=(1.0, 1.0), rotation_deg=45)
    images = torch.full((5, 1, 64, 64), 100.0)
    params = drawn(transform, images) | {"air": torch.full((5,), -1024.0)}
    params["rotation_deg"] = torch.full((5,), 45.0)
    out = transform.apply(images, params)
    assert torch.all(out[:, 0, 0, 0] == -1024)
    assert torch.allclose(out[:, 0, 20:44, 20:44], torch.tensor(100.0))


def test_a_large_crop_is_antialiased() -> None:
    """A one-pixel checkerboard shows nothing at a quarter of its size: it must become grey, not moiré."""
    board = (torch.arange(256)[:, None] + torch.arange(256)) % 2
    transform = RandomResizedCrop(64, area=(0.7, 1.0), rotation_deg=10)
    out = transform(board[None, None].float().expand(8, 1, 256, 256))
    middle = out[..., 16:48, 16:48]
    assert float((middle - 0.5).abs().max()) < 0.01
    torch.testing.assert_close(pyramid_level(torch.tensor([96.0, 97.0, 193.0]), torch.tensor([96.0, 97.0, 193.0]), 64),
                               torch.tensor([0, 1, 2]))  # fmt: skip


@pytest.mark.parametrize("kind", EVERY)
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, kind: type[BatchTransform]) -> None:
    """A batch is worked on in blocks that fit the cache; where the cut falls must not matter."""
    transform, images = make(kind), images_for(kind, n=9)
    params = drawn(transform, images)
    whole = transform.apply(images, params)
    monkeypatch.setattr("medclr.augment.transform.CACHED", 2 * images[0].numel())
    assert torch.equal(transform.apply(images, params), whole)


# ---- intensity


def test_scaling_is_monais() -> None:
    images = images_for(RandomWindow)
    low, high = torch.linspace(-900, -100, 6), torch.linspace(0, 600, 6)
    out = intensity.scale_to_unit(images, low, high)
    for i in range(6):
        theirs = ScaleIntensityRange(float(low[i]), float(high[i]), 0.0, 1.0, clip=True)(images[i])
        torch.testing.assert_close(out[i], theirs, atol=1e-5, rtol=0)


def test_an_empty_range_is_a_step() -> None:
    out = intensity.scale_to_unit(torch.tensor([-1.0, 0.0, 5.0, 6.0]).view(1, 1, 2, 2), *torch.tensor([[5.0], [5.0]]))
    assert out.isfinite().all()
    assert out.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]


def test_gamma_is_monais() -> None:
    images, exponent = images_for(intensity.RandomGamma), torch.linspace(0.4, 2.5, 6)
    out = intensity.gamma(images, exponent)
    inverted = intensity.RandomGamma(invertible=True).transform(
        images, {"gamma": exponent, "inverted": torch.ones(6, dtype=torch.bool)}
    )
    for i in range(6):
        assert (float(images[i].min()), float(images[i].max())) == (0.0, 1.0)  # MONAI stretches to this range first
        theirs = AdjustContrast(float(exponent[i]))(images[i])
        torch.testing.assert_close(out[i], theirs, atol=1e-5, rtol=0)
        theirs = AdjustContrast(float(exponent[i]), invert_image=True)(images[i])
        torch.testing.assert_close(inverted[i], theirs, atol=1e-5, rtol=0)


def test_contrast_agrees_with_a_slow_reference() -> None:
    images, factor, brightness = (
        images_for(intensity.RandomContrast),
        torch.linspace(0.5, 2, 6),
        torch.linspace(-0.3, 0.3, 6),
    )
    out = intensity.contrast(images, factor, brightness)
    for i in range(6):
        x = images[i, 0].double().numpy()
        expected = np.clip(float(factor[i]) * (x - x.mean()) + x.mean() + float(brightness[i]), 0, 1)
        assert np.abs(out[i, 0].numpy() - expected).max() < 1e-5


def test_bias_field_is_monais() -> None:
    images = images_for(intensity.RandomBiasField) * 0.3  # nothing is clipped
    R, lower = np.random.RandomState(0), np.tril_indices(4)
    drawn_coefficients = R.uniform(-0.2, 0.2, (6, 10))
    coefficients = np.zeros((6, 4, 4), np.float32)
    coefficients[:, lower[0], lower[1]] = drawn_coefficients
    out = intensity.bias_field(images, torch.from_numpy(coefficients))
    monai = RandBiasField(degree=3)
    for i in range(6):
        field = np.exp(monai._generate_random_field(images.shape[2:], 3, drawn_coefficients[i]))
        assert np.abs(out[i, 0].numpy() - images[i, 0].numpy() * field).max() < 1e-5


def test_gain_is_a_bias_field_of_depth_alone() -> None:
    images = images_for(intensity.RandomGain) * 0.3
    coefficients = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.2
    expected = intensity.bias_field(images, coefficients[:, :, None])
    torch.testing.assert_close(intensity.gain(images, coefficients), expected)


def test_blur_is_monais_inside_and_normalised_at_the_edge() -> None:
    images, sigma = images_for(intensity.RandomBlur, height=100, width=60), torch.linspace(0.3, 1.2, 6)
    out = intensity.blur(images, sigma)
    inside = (slice(None), slice(6, -6), slice(6, -6))  # MONAI pads with zero
    for i in range(6):
        if float(sigma[i]) > 0.8:  # below it, MONAI's sampled kernel does not sum to 1
            theirs = GaussianSmooth(float(sigma[i]), approx="sampled")(images[i])
            torch.testing.assert_close(out[i][inside], theirs[inside], atol=1e-4, rtol=0)
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / sigma.numpy()[:, None]) ** 2)
    for i in range(6):
        k = kernel[i] / kernel[i].sum()
        expected = images[i, 0].double().numpy()
        for axis in (0, 1):
            expected = ndimage.correlate1d(expected, k, axis=axis, mode="nearest")
        assert np.abs(out[i, 0].numpy() - expected).max() < 1e-5
    flat = torch.full((2, 1, 64, 64), 0.7)
    torch.testing.assert_close(intensity.blur(flat, torch.tensor([0.1, 2.0])), flat)


def test_blur_beyond_four_sigma_is_nothing() -> None:
    images, sigma = images_for(intensity.RandomBlur, n=8, height=240, width=60), torch.linspace(0.1, 2, 8)
    whole = intensity.blur(images, sigma)
    short = intensity.RandomBlur((0.1, 2.0)).transform(images, {"sigma_px": sigma})
    assert not torch.equal(short, whole)
    torch.testing.assert_close(short, whole, atol=5e-5, rtol=0)


def test_both_ways_to_blur_agree() -> None:
    """Sums of rows on a processor, sums of shifted images on a GPU."""
    images = images_for(intensity.RandomBlur, height=70, width=60)
    kernel = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    kernel = torch.cat([kernel.flip(1), kernel[:, 1:]], 1)  # [6,7], symmetric
    rows, shifts = intensity._blur_rows(images, kernel), intensity._blur_shifts(images, kernel)
    torch.testing.assert_close(rows, shifts, atol=1e-5, rtol=1e-5)


def test_noise_bank() -> None:
    fields = intensity.noise(torch.linspace(0, 0.99, 30), 50, 70)  # [30,1,50,70]
    assert stats.kstest(fields.flatten().numpy()[::7], "norm").pvalue > 0.01
    correlation = np.corrcoef(fields.flatten(1).numpy())
    assert np.abs(correlation - np.eye(30)).max() < 0.08  # 4.7 standard deviations of 3,500 independent values
    assert torch.equal(fields[3:4], intensity.noise(torch.linspace(0, 0.99, 30)[3:4], 50, 70))
    with pytest.raises(ValueError, match="larger than the noise bank"):
        intensity.noise(torch.zeros(1), 2048, 1024)


def test_additive_and_multiplicative_noise() -> None:
    images, std, offset = images_for(intensity.RandomSpeckle), torch.linspace(0.02, 0.3, 6), torch.linspace(0, 0.9, 6)
    n = intensity.noise(offset, 40, 31).double()
    x, s = images.double(), std.double()[:, None, None, None]
    for ours, expected in (
        (intensity.gaussian_noise(images, std, offset), x + s * n),
        (intensity.speckle(images, std, offset), (x * (1 + s * n)).clamp(0, 1)),
    ):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


def test_rician_noise_of_nothing_is_rayleigh() -> None:
    """Closed form: in air, magnitude noise follows a Rayleigh distribution; far above the noise it is Gaussian."""
    std = torch.full((8,), 0.05)
    offset, other = torch.linspace(0, 0.4, 8), torch.linspace(0.5, 0.9, 8)
    air = intensity.rician_noise(torch.zeros(8, 1, 48, 48), std, offset, other)
    assert stats.kstest(air.flatten().numpy()[::5], stats.rayleigh(scale=0.05).cdf).pvalue > 0.01
    tissue = intensity.rician_noise(torch.full((8, 1, 48, 48), 0.5), std, offset, other)
    assert float(tissue.std()) == pytest.approx(0.05, rel=0.02)
    assert float(tissue.mean()) == pytest.approx(np.sqrt(0.5**2 + 0.05**2), rel=0.01)


def test_cutout_overwrites_its_rectangle_by_the_mean() -> None:
    images = images_for(intensity.RandomCutout, height=20, width=40)
    box = torch.tensor([[0.1, 0.2, 0.5, 0.6]]).repeat(6, 1)
    out = intensity.cutout(images, box)
    expected = images.clone()
    expected[:, :, 2:10, 8:24] = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(out, expected)


N = 3000


def uniform_between(low: float, high: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    cdf: Callable[[NDArray[np.float64]], NDArray[np.float64]] = stats.uniform(low, high - low).cdf
    return cdf


def sampled(transform: BatchTransform) -> dict[str, NDArray[np.float64]]:
    return {key: value.double().numpy() for key, value in transform.draw(N, np.random.RandomState(11)).items()}


def fits(values: NDArray[np.float64], low: float, high: float) -> bool:
    return float(stats.kstest(values, uniform_between(low, high)).pvalue) > 0.01


@pytest.mark.parametrize("prob", [0.2, 0.8])
@pytest.mark.parametrize("kind", OPTIONAL)
def test_the_decision_follows_the_probability(kind: type[BatchTransform], prob: float) -> None:
    assert stats.binomtest(int(sampled(make(kind, prob=prob))["on"].sum()), N, prob).pvalue > 0.01


def test_intensity_parameters_follow_their_distributions() -> None:
    gamma = sampled(intensity.RandomGamma(0.4))
    assert fits(np.log(gamma["gamma"]), -0.4, 0.4)
    assert not gamma["inverted"].any()
    assert stats.binomtest(int(sampled(intensity.RandomGamma(invertible=True))["inverted"].sum()), N, 0.5).pvalue > 0.01
    contrast = sampled(intensity.RandomContrast(0.4, 0.1))
    assert fits(np.log(contrast["contrast"]), -0.4, 0.4)
    assert fits(contrast["brightness"], -0.1, 0.1)
    scale = sampled(PercentileScale(0.05))
    assert fits(scale["low_shift"], -0.05, 0.05)
    assert fits(scale["high_shift"], -0.05, 0.05)
    assert fits(sampled(intensity.RandomBlur((0.1, 2.0)))["sigma_px"], 0.1, 2.0)
    for kind in (
        intensity.RandomGaussianNoise,
        RandomQuantumNoise,
        intensity.RandomRicianNoise,
        intensity.RandomSpeckle,
    ):
        noise = sampled(kind(0.1))
        assert fits(noise["std"], 0, 0.1)
        assert fits(noise["offset"], 0, 1)
        assert fits(noise["offset_imaginary"], 0, 1)
    top, left, bottom, right = sampled(intensity.RandomCutout((0.02, 0.15)))["box"].T
    assert fits((bottom - top) * (right - left), 0.02, 0.15)
    assert fits(np.log((right - left) / (bottom - top)), -np.log(2), np.log(2))
    assert fits(top / (1 - bottom + top), 0, 1)
    assert fits(left / (1 - right + left), 0, 1)


def test_bias_coefficients_are_those_up_to_the_degree_without_the_constant() -> None:
    coefficients = sampled(intensity.RandomBiasField(0.3, degree=3))["coefficients"]  # [N,4,4]
    for j in range(4):
        for k in range(4):
            if 0 < j + k <= 3:
                assert fits(coefficients[:, j, k], -0.3, 0.3)
            else:
                assert not coefficients[:, j, k].any()


def test_windows_are_drawn_evenly_and_jittered() -> None:
    windows = (Window("narrow", 40, 80), Window("wide", 500, 2000))
    params = sampled(RandomWindow(windows, jitter=0.2))
    wide = params["width"] > 1000
    assert stats.binomtest(int(wide.sum()), N, 0.5).pvalue > 0.01
    for window, chosen in zip(windows, (~wide, wide), strict=True):
        assert fits(np.log(params["width"][chosen] / window.width), -0.2, 0.2)
        assert fits((params["center"][chosen] - window.center) / (window.width / 2), -0.2, 0.2)


def test_inversion_safe_gamma_treats_a_negative_alike() -> None:
    """The distribution of gammas of 1 - x is that of 1 minus the gammas of x."""
    x = torch.full((N, 1, 1, 1), 0.3)
    transform = intensity.RandomGamma(0.5, invertible=True, prob=1.0)
    positive = transform.apply(x, transform.draw(N, np.random.RandomState(0))).flatten()
    negative = transform.apply(1 - x, transform.draw(N, np.random.RandomState(1))).flatten()
    assert stats.ks_2samp(positive.numpy(), 1 - negative.numpy()).pvalue > 0.01
    plain = intensity.RandomGamma(0.5, prob=1.0)
    lopsided = plain.apply(1 - x, plain.draw(N, np.random.RandomState(1))).flatten()
    assert stats.ks_2samp(positive.numpy(), 1 - lopsided.numpy()).pvalue < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", EVERY)
def test_a_gpu_agrees(kind: type[BatchTransform]) -> None:
    transform, images = make(kind), images_for(kind)
    params = drawn(transform, images)
    span = float(images.max() - images.min())
    there = transform.apply(images.cuda(), params)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), transform.apply(images, params), atol=1e-4 * span, rtol=0)


def test_resample_takes_any_affine_map() -> None:
    """A shear, which no transform draws, agrees with scipy too."""
    image = torch.rand(1, 1, 30, 30, generator=torch.Generator().manual_seed(3))
    matrix = torch.tensor([[[12.0, 4.0, 15.0], [0.0, 10.0, 14.0]]])
    out = resample(image, matrix, torch.zeros(1), 20)
    t = (np.arange(20) * 2 + 1) / 20 - 1
    v, u = np.meshgrid(t, t, indexing="ij")
    at = np.stack([10 * v + 14 - 0.5, 12 * u + 4 * v + 15 - 0.5])
    expected = ndimage.map_coordinates(image[0, 0].double().numpy(), at, order=1, mode="grid-constant")
    assert np.abs(out[0, 0].numpy() - expected).max() < 1e-4
