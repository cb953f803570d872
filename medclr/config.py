"""Typed settings: strict YAML and command line in, resolved YAML out.

A setting is a field of a frozen dataclass with a docstring under it; that docstring is its ``--help``. The settings of
a pretraining method live in the method's own file (``medclr/methods/NAME.py``, class ``Config``) and stand in the YAML
under the method's name, so that a new method needs no edit of this file.
"""

import difflib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medclr.errors import MedclrError


@dataclass(frozen=True)
class EncoderConfig:
    """The network that is pretrained, on grey slices."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "efficientnet-lite0"] = "resnet18"
    """ResNet-18 and 34 have 512 features, the others 2048, times width; efficientnet-lite0 (extra: imagenet) 1280."""

    width: float = 1.0
    """Multiplies the channels of every layer of a ResNet: 2 is the "2x" of SimCLR, 0.25 is for small images and few
    cores."""

    stem: Literal["auto", "imagenet", "medium", "small"] = "auto"
    """First layers. imagenet: 7x7 stride 2 and max-pool (1/4 of the size); medium: 3x3 stride 2 (1/2; for about 64 px);
    small: 3x3 stride 1 (the CIFAR ResNet); auto: small for inputs of at most 32 px, imagenet above."""

    normalise: Literal["none", "imagenet"] = "none"
    """What the first convolution of a ResNet does to the image in [0,1]: none, or imagenet: subtract ImageNet's mean
    and divide by its deviation per colour, folded into the weights (models/weights.py). Goes with ImageNet weights."""

    slices: int = 1
    """Neighbouring slices that the first convolution sees as channels, an odd number; 1: each slice alone."""

    def __post_init__(self) -> None:
        _require(
            {
                "encoder.slices": (self.slices >= 1 and self.slices % 2 == 1, "an odd number, at least 1"),
                "encoder.width": (
                    self.width > 0 and 8 * self.width % 1 == 0,
                    "a multiple of 1/8, such as 0.25 or 2",
                ),
            }
        )


@dataclass(frozen=True)
class ViewsConfig:
    """How the two random views of a slice are made; what is plausible for a modality stands in scans/modality.py."""

    size_px: int = 224
    """Rows and columns of a view."""

    size_px_schedule: tuple[tuple[float, int], ...] | None = None
    """Progressive resolution, for pretraining: from which share of the run on views have which size, such as
    [[0, 48], [0.7, 64]]. It ends with size_px, for which the network is made and at which it is judged. null: size_px
    throughout."""

    crop_area: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as fractions of the slice."""

    rotation_deg: float | None = None
    """Largest rotation either way, in degrees; null: what is plausible for the modality."""

    flip: bool = True
    """Mirror views at random, where the modality allows it."""

    strength: float = 1.0
    """Multiplies the width of every intensity jitter: window, range, gamma, contrast, bias field, gain and noise."""

    noise: float = 0.5
    """Probability of noise (of speckle, in ultrasound)."""

    blur: float = 0.5
    """Probability of a Gaussian blur."""

    cutout: float = 0.2
    """Probability that a rectangle is cut out."""

    chain: list[dict[str, Any]] | None = None
    """Transforms of your own, after the crop and the scaling to [0,1], such as [{name: RandomGamma, log_gamma: 0.4},
    {name: RandGaussianNoise, prob: 0.5, std: 0.1}]: of medclr (medclr/augment), or random ones of MONAI, by name and
    arguments. strength, noise, blur and cutout then say nothing. null: by modality."""

    def __post_init__(self) -> None:
        low, high = self.crop_area
        sizes = f"8 px to views.size_px, which is the last one, such as [[0, 32], [0.5, {self.size_px}]]"
        _require(
            {
                "views.size_px": (self.size_px >= 8, "at least 8"),
                "views.size_px_schedule": (
                    self._is_schedule(),
                    f"pairs of a share of the run, ascending from 0 to below 1, and a size: {sizes}; or null",
                ),
                "views.crop_area": (0 < low <= high <= 1, "two fractions, 0 < smallest <= largest <= 1"),
                "views.rotation_deg": (self.rotation_deg is None or 0 <= self.rotation_deg <= 180, "0 to 180, or null"),
                "views.strength": (0 <= self.strength <= 2, "0 (no intensity jitter) to 2"),
                **{
                    f"views.{name}": (0 <= getattr(self, name) <= 1, "a probability, 0 to 1")
                    for name in ("noise", "blur", "cutout")
                },
                "views.chain": (
                    self.chain is None or all(isinstance(entry.get("name"), str) for entry in self.chain),
                    "a list of {name: NAME, argument: value}, or null",
                ),
            }
        )

    def _is_schedule(self) -> bool:
        if self.size_px_schedule is None:
            return True
        shares = [share for share, _ in self.size_px_schedule]
        sizes = [size for _, size in self.size_px_schedule]
        return (
            shares[:1] == [0]
            and shares == sorted(set(shares))
            and shares[-1] < 1
            and min(sizes) >= 8
            and max(sizes) == sizes[-1] == self.size_px
        )

    def at(self, share: float) -> "ViewsConfig":
        """As they are when that share of the run is done, at least 0 and below 1: of one size."""
        sizes = [size for start, size in self.size_px_schedule or () if start <= share]
        return replace(self, size_px=sizes[-1] if sizes else self.size_px, size_px_schedule=None)


@dataclass(frozen=True)
class DataConfig:
    """Which slices of the store are trained on."""

    split: str = ""
    """Only scans of this split of the manifest (say, train); empty: all. What is tested on later must stay out."""

    slices_per_scan: int | None = None
    """An epoch takes at most this many slices of each scan, drawn anew each epoch; null: all."""

    leave_out: Path | None = None
    """Table of slices that are not trained on, such as the duplicates that medclr dedup finds; null: none."""

    leave_out_sha256: str | None = None
    """Filled in by the run: the hash of that table, which must not change under the same name."""

    order: Literal["auto", "shuffle", "shards"] = "auto"
    """shuffle: all slices at random; shards: the store's files in random order, each read from end to end, and slices
    at random within a window of them, for a store that does not fit in memory; auto: shards where the slices take more
    than half of the memory. A run keeps, on any machine, what was chosen when it began."""

    window_mb: int = 2048
    """The window of order shards, in MiB of slices; memory should hold two."""

    def __post_init__(self) -> None:
        _require({"data.window_mb": (self.window_mb >= 1, "at least 1")})


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["lars", "adamw", "sgd"] = "lars"
    """LARS as in SimCLR, or AdamW / SGD from torch."""

    lr: float | None = None
    """Base learning rate, before scaling with the batch; null: by optimizer, for lr_scaling sqrt: 0.075 for lars,
    6.25e-5 for adamw (1e-3 at a batch of 256), 3.125e-3 for sgd (0.05 at a batch of 256)."""

    lr_scaling: Literal["linear", "sqrt", "none"] = "sqrt"
    """linear: lr x batch/256; sqrt: lr x sqrt(batch); none: lr as it is."""

    weight_decay: float = 1e-6
    """Weight decay; biases and normalisation are excluded."""

    momentum: float = 0.9
    """Momentum of LARS and SGD."""

    warmup: float = 0.1
    """Share of the run with a linear warm-up from 0; cosine to 0 follows."""

    @property
    def base_lr(self) -> float:
        """``lr``, or that of the optimizer."""
        return {"lars": 0.075, "adamw": 6.25e-5, "sgd": 3.125e-3}[self.name] if self.lr is None else self.lr


@dataclass(frozen=True)
class MonitorConfig:
    """What a run watches and keeps."""

    every_epochs: int = 1
    """Effective rank, uniformity and kNN on a fixed sample of training slices, each so many epochs."""

    sample: int = 1024
    """Slices in that sample."""

    checkpoint_minutes: float = 10.0
    """A checkpoint at least this often, and at the end and when interrupted."""

    keep: int = 2
    """How many of the newest checkpoints stay; the best one (by kNN, without labels by the loss) stays besides."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of ``medclr finetune``: how a model is trained on labelled cases."""

    seed: int = 0
    """Which cases are drawn, and every sample order, view and initial weight."""

    validation: float | None = None
    """Share of the cases that is held out to choose the step at which to stop; null: a fifth of 20 cases and more, none
    of fewer, which then follow the whole schedule."""

    steps: int = 300
    """Steps of training; with validation cases the most there can be."""

    every: int = 25
    """Steps from one look at the validation cases to the next."""

    patience: int = 4
    """Looks without a better score before training stops; the best weights are kept."""

    batch: int = 32
    """Items a step: slices, or whole scans."""

    size_px: int | None = None
    """Side of the images; null: what the encoder was made for, but at most that of the stored slices."""

    lr: float = 1e-3
    """Peak learning rate (AdamW) of what is new: head or decoder."""

    encoder_lr: float = 0.3
    """The encoder's last stage learns at so many times that rate."""

    layer_decay: float = 0.8
    """Each stage before it at so many times the rate of the stage behind."""

    free_stages: int = 5
    """How many stages of the encoder are trained, from the last on: 0: it stays frozen; 5: all of it."""

    frozen_steps: float = 0.1
    """Share of the steps, at the start, in which the encoder is frozen whatever free_stages says; not if it is new."""

    batch_norm: Literal["train", "frozen"] = "train"
    """Whether the encoder's batch norm follows the labelled cases, or keeps its statistics; those of an encoder that
    starts at random always follow."""

    weight_decay: float = 1e-2
    """Weight decay; biases and normalisation are excluded."""

    warmup: float = 0.1
    """Share of the steps with a linear warm-up from 0; cosine to 0 follows."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network; bfloat16 is autocast."""

    device: str = "auto"
    """auto: cuda where there is one, else cpu."""

    checkpoint_minutes: float = 5.0
    """A checkpoint at least this often, and when interrupted; the same command goes on."""

    network: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder's network, where a run does not say it: for random, imagenet and files. slices is for runs too."""

    views: ViewsConfig = field(
        default_factory=lambda: ViewsConfig(crop_area=(0.5, 1.0), strength=0.5, noise=0.2, blur=0.2, cutout=0.0)
    )
    """The augmentation: milder than in pretraining, because the label must stay true. size_px is set above."""

    def __post_init__(self) -> None:
        _require(
            {
                "seed": (self.seed >= 0, "at least 0"),
                "validation": (self.validation is None or 0 <= self.validation < 1, "a share, 0 to below 1, or null"),
                "steps": (self.steps >= 1, "at least 1"),
                "every": (self.every >= 1, "at least 1"),
                "patience": (self.patience >= 1, "at least 1"),
                "batch": (self.batch >= 2, "at least 2, because batch norm needs more than one"),
                "size_px": (self.size_px is None or self.size_px >= 8, "at least 8, or null"),
                "views.size_px_schedule": (self.views.size_px_schedule is None, "null: it is for pretraining"),
                "lr": (self.lr > 0, "above 0"),
                "encoder_lr": (self.encoder_lr >= 0, "at least 0"),
                "layer_decay": (0 < self.layer_decay <= 1, "above 0 and at most 1"),
                "free_stages": (0 <= self.free_stages <= 5, "0 to 5"),
                "frozen_steps": (0 <= self.frozen_steps <= 1, "a share, 0 to 1"),
                "weight_decay": (self.weight_decay >= 0, "at least 0"),
                "warmup": (0 <= self.warmup < 1, "a share, at least 0 and below 1"),
                "checkpoint_minutes": (self.checkpoint_minutes >= 0, "at least 0"),
            }
        )


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of ``medclr pretrain``."""

    method: str = "simclr"
    """A file of medclr/methods; its own settings stand under its name."""

    seed: int = 0
    """Every sample order, view and initial weight follows from it."""

    epochs: int = 100
    """Passes over the slices."""

    batch: int = 256
    """Slices a step; each gives two views. The last partial batch of an epoch is dropped."""

    chunk: int | None = None
    """Gradient caching: slices that go through the network at once, over all processes, so that memory does not grow
    with batch; exact, at about a third more time. Batch norm takes its statistics over one view of a chunk."""

    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Arithmetic of the network. bfloat16 and float16 are autocast: loss and weights stay in float32. float64 is slow
    and shows what rounding does."""

    compile: bool = False
    """Let torch.compile translate the network; it takes minutes at the start."""

    skip_nonfinite: int = 0
    """Steps whose loss or gradient is not finite that are left out, weights unchanged, before the run stops."""

    device: str = "auto"
    """auto: cuda where there is one, else cpu."""

    init: str = "random"
    """Weights to start from. random; imagenet (goes with encoder.name efficientnet-lite0); a run folder of
    pretraining; or a file of torchvision's ResNet weights (goes with encoder.normalise imagenet)."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The network."""

    views: ViewsConfig = field(default_factory=ViewsConfig)
    """The augmentation."""

    data: DataConfig = field(default_factory=DataConfig)
    """The slices."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""

    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Monitoring and checkpoints."""

    def __post_init__(self) -> None:
        _require(
            {
                "seed": (self.seed >= 0, "at least 0"),
                "epochs": (self.epochs >= 1, "at least 1"),
                "batch": (self.batch >= 2, "at least 2, because a lone slice has no negatives"),
                "optim.lr": (self.optim.lr is None or self.optim.lr > 0, "above 0, or null"),
                "optim.lr_scaling": (
                    self.optim.lr_scaling == "sqrt" or self.optim.lr is not None,
                    "sqrt where optim.lr is null, because the optimizers' own rates go with that",
                ),
                "chunk": (self.chunk is None or self.chunk >= 2, "at least 2, or null"),
                "skip_nonfinite": (self.skip_nonfinite >= 0, "at least 0"),
                "optim.weight_decay": (self.optim.weight_decay >= 0, "at least 0"),
                "optim.momentum": (0 <= self.optim.momentum < 1, "at least 0 and below 1"),
                "optim.warmup": (0 <= self.optim.warmup < 1, "a share of the run, at least 0 and below 1"),
                "monitor.every_epochs": (self.monitor.every_epochs >= 1, "at least 1"),
                "monitor.sample": (self.monitor.sample >= 2, "at least 2, because spread takes two"),
                "monitor.checkpoint_minutes": (self.monitor.checkpoint_minutes >= 0, "at least 0"),
                "monitor.keep": (self.monitor.keep >= 1, "at least 1"),
            }
        )


def _require(rules: Mapping[str, tuple[bool, str]]) -> None:
    """Raise one MedclrError that names every setting whose rule does not hold."""
    wrong = [f"{key} must be {rule}" for key, (holds, rule) in rules.items() if not holds]
    if wrong:
        raise MedclrError("; ".join(wrong))


def nearest(word: str, known: Sequence[str]) -> str:
    """``'; the nearest known is X'``, or all the known ones where nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; the nearest known one is {close[0]!r}" if close else f"; known are {', '.join(sorted(known))}"


def option_parser(prog: str, description: str, add: Callable[[Any], None], *, config: bool = False) -> Any:
    """A strict jsonargparse parser; ``add(parser)`` declares the options, ``config`` allows ``--config FILE``."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False)
    if config:
        parser.add_argument("--config", action="config", help="YAML file with settings; later ones win.")
    add(parser)
    return parser


def parse(parser: Any, arguments: Sequence[str]) -> Any:
    """Parse and build: nested groups become their dataclasses.

    Raises:
        MedclrError: an unknown setting (with the nearest known one) or a wrong type, in a file or an option.
    """
    import argparse

    from jsonargparse import ActionConfigFile

    known = [option for action in parser._actions for option in action.option_strings]
    has_files = any(isinstance(action, ActionConfigFile) for action in parser._actions)  # else --config is its own
    arguments = [_underscored(word, known) for word in arguments]
    for word in arguments:
        name = word.split("=", 1)[0]
        if name.startswith("--") and len(name) > 2 and name not in known:
            raise MedclrError(f"unknown setting {name}{nearest(name, known)}")
    for path in _config_files(arguments) if has_files else ():
        _check_keys(path, {option[2:] for option in known if option.startswith("--")})
    try:
        return parser.instantiate(parser.parse_args(list(arguments)))
    except argparse.ArgumentError as error:
        raise MedclrError(_one_sentence(str(error))) from error


def chosen_first(arguments: Sequence[str], name: str) -> str | None:
    """An option that decides which other settings exist, read before them: the option, else the file, else None."""
    import argparse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{name}")
    first.add_argument("--config", type=Path)
    chosen, _ = first.parse_known_args(list(arguments))
    value = getattr(chosen, name) or (read_yaml(chosen.config).get(name) if chosen.config else None)
    return None if value is None else str(value)


def dataclass_options(
    parser: Any, settings: type, group: str | None = None, *, leave_out: Collection[str] = ()
) -> None:
    """Declare each field of the dataclass ``settings``, nested ones included, optionally under ``group``."""
    parser.add_class_arguments(settings, group, help=(settings.__doc__ or "").strip(), skip=set(leave_out))


def to_plain(settings: Any) -> dict[str, Any]:
    """A settings dataclass as nested plain types, equal to what ``read_yaml`` gives back for its YAML."""
    plain: dict[str, Any] = _plain(settings)
    return plain


def to_yaml(settings: dict[str, Any]) -> str:
    """Resolved settings as YAML, in the order of their declaration."""
    import yaml

    return str(yaml.safe_dump(_plain(settings), sort_keys=False, default_flow_style=None, width=120))


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the settings in which two resolved configurations differ, with both values."""
    flat_a, flat_b = dict(flatten(a)), dict(flatten(b))
    pairs = {key: (flat_a.get(key), flat_b.get(key)) for key in sorted(flat_a.keys() | flat_b.keys())}
    return {key: (was, now) for key, (was, now) in pairs.items() if was != now}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        MedclrError: missing, not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedclrError(f"{path}: there is no such settings file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MedclrError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise MedclrError(f"{path}: expected settings as 'name: value' lines")
    return content


def _underscored(word: str, known: Sequence[str]) -> str:
    """``--key-file`` is ``--key_file``: either spelling is accepted."""
    name, equals, value = word.partition("=")
    spelled = "--" + name.removeprefix("--").replace("-", "_")
    return spelled + equals + value if name.startswith("--") and name not in known and spelled in known else word


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if word == "--config" and following:
            yield Path(following)
        elif word.startswith("--config="):
            yield Path(word.removeprefix("--config="))


def _check_keys(path: Path, known: set[str]) -> None:
    given = read_yaml(path)
    for key, _ in flatten(given):
        group = key.split(".")[0]
        is_lost = not any(name.startswith(f"{group}.") for name in known)
        if is_lost and group == given.get("method"):  # another method is asked for by an option
            raise MedclrError(
                f"{path}: its settings are those of method {group}; take the file of the other method, such as "
                f"configs/pretrain/dense.yaml for dense, or delete its lines below {group!r}"
            )
        if key not in known:
            raise MedclrError(f"{path}: unknown setting {key!r}{nearest(key, sorted(known))}")
        if inside := sorted(name for name in known if name.startswith(f"{key}.")):
            raise MedclrError(f"{path}: {key!r} is a group; write its settings below it, such as {inside[0]}")


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of nested groups by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _one_sentence(text: str) -> str:
    """jsonargparse explains over several indented lines, in Python's words; the user gets one sentence in ours."""
    text = " ".join(text.replace("Parser key", "setting").replace("<class '", "").replace("'>", "").split())
    text = re.sub(r"Does not validate against any .*? Errors: - (.*) Given value type: \w+ Given", r"\1. Got", text)
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    return text.replace(" - Expected a NoneType", " or null").replace("Expected a int", "Expected an int")
