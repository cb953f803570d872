"""Batched random transforms (MONAI RandomizableTransforms) and the views made of them."""

from medclr.augment.geometry import RandomResizedCrop
from medclr.augment.intensity import (
    PercentileScale,
    RandomBiasField,
    RandomBlur,
    RandomContrast,
    RandomCutout,
    RandomGain,
    RandomGamma,
    RandomGaussianNoise,
    RandomQuantumNoise,
    RandomRicianNoise,
    RandomSpeckle,
    RandomWindow,
)
from medclr.augment.transform import BatchTransform

TRANSFORMS: tuple[type[BatchTransform], ...] = (
    RandomResizedCrop,
    RandomWindow,
    PercentileScale,
    RandomGamma,
    RandomContrast,
    RandomBiasField,
    RandomGain,
    RandomGaussianNoise,
    RandomQuantumNoise,
    RandomRicianNoise,
    RandomSpeckle,
    RandomBlur,
    RandomCutout,
)
"""Every transform; one contract test runs through all of them."""

__all__ = [t.__name__ for t in TRANSFORMS]
