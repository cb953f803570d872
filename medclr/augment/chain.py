"""Chains of the user's own: transforms by name, ours or MONAI's random ones, checked before anything runs.

An entry is ``{name: NAME, argument: value, ...}``. The crop comes first and the scaling to [0,1] next, both as for the
modality, unless the chain names them; what follows is the chain.
"""

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from medclr.augment import TRANSFORMS
from medclr.augment.geometry import RandomResizedCrop
from medclr.augment.intensity import PercentileScale, RandomQuantumNoise, RandomWindow
from medclr.augment.single import MonaiTransforms, apply_here
from medclr.augment.transform import BatchTransform
from medclr.config import ViewsConfig, nearest
from medclr.errors import MedclrError
from medclr.scans.modality import MODALITIES, Modality, Window

Chain = tuple[BatchTransform, ...]
Entry = Mapping[str, Any]

OWN = {kind.__name__: kind for kind in TRANSFORMS}
CROP, WINDOW, QUANTUM = RandomResizedCrop.__name__, RandomWindow.__name__, RandomQuantumNoise.__name__
SCALES = (WINDOW, PercentileScale.__name__)
USUAL = {CROP: ("area", "rotation_deg", "flip_lr", "flip_ud"), WINDOW: ("windows",)}
"""Arguments that follow from the modality and the other settings of views, where an entry does not give them."""


def crop_for(modality: Modality, config: ViewsConfig, **given: Any) -> RandomResizedCrop:
    """The crop of a modality; ``given`` wins."""
    usual: dict[str, Any] = {
        "area": config.crop_area,
        "rotation_deg": modality.rotation_deg if config.rotation_deg is None else config.rotation_deg,
        "flip_lr": config.flip and modality.flip_lr,
        "flip_ud": config.flip and modality.flip_ud,
    }
    return RandomResizedCrop(config.size_px, **(usual | given))


def scale_for(modality: Modality, config: ViewsConfig) -> BatchTransform:
    """The scaling to [0,1] of a modality."""
    k = config.strength
    return RandomWindow(modality.windows, 0.2 * k) if modality.windows else PercentileScale(0.05 * k)


def custom_chain(modality: Modality, config: ViewsConfig) -> Chain:
    """The chain of ``views.chain`` for a modality. MONAI's transforms that follow each other are one step.

    Raises:
        MedclrError: RandomWindow without windows, for a modality that has none.
    """
    entries = list(config.chain or ())
    names = [entry["name"] for entry in entries]
    if CROP not in names:
        entries.insert(0, {"name": CROP})
    scale = None if set(SCALES) & set(names) else scale_for(modality, config)
    steps: list[BatchTransform] = []
    is_scaled = False
    for is_own, group in groupby(entries, key=lambda entry: entry["name"] in OWN):
        if not is_own:
            steps.append(MonaiTransforms(list(group), is_scaled=is_scaled))
            continue
        for entry in group:
            steps.append(_own(entry, modality, config))
            is_scaled |= entry["name"] in SCALES
            if entry["name"] == CROP and scale is not None:
                steps.append(scale)
                is_scaled = True
    return tuple(steps)


def _own(entry: Entry, modality: Modality, config: ViewsConfig) -> BatchTransform:
    name, given = entry["name"], {key: _tuple(value) for key, value in entry.items() if key != "name"}
    if name == CROP:
        return crop_for(modality, config, **given)
    if name == WINDOW:
        pairs = given.pop("windows", ())
        windows = tuple(Window(f"{center:g}/{width:g}", center, width) for center, width in pairs) or modality.windows
        if not windows:
            what = "give its windows as pairs of centre and width, or take PercentileScale"
            raise MedclrError(f"views.chain: {WINDOW}: {modality.name} has no windows of its own; {what}")
        return RandomWindow(windows, **given)
    return OWN[name](**given)


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def resolved(config: ViewsConfig) -> ViewsConfig:
    """The same, with the defaults of all arguments of ``chain`` written out, so that they are kept with the run.

    Raises:
        MedclrError: a name that is unknown or no random transform, an argument that is unknown or missing, an order
            that cannot be, or a transform that does not work with it.
    """
    if config.chain is None:
        return config
    entries = [_resolved(entry) for entry in config.chain]
    names = [entry["name"] for entry in entries]
    if CROP in names[1:]:
        raise MedclrError(f"views.chain: {CROP} comes first, and once")
    scales = [i for i, name in enumerate(names) if name in SCALES]
    if len(scales) > 1:
        raise MedclrError(f"views.chain: {names[scales[0]]} and {names[scales[1]]}: an image is scaled to [0,1] once")
    if QUANTUM in names and not (scales and names.index(QUANTUM) < scales[0]):
        which = " or ".join(SCALES)
        raise MedclrError(f"views.chain: {QUANTUM} is noise of physical values: it stands before a {which}")
    return replace(config, chain=entries)


def check(config: ViewsConfig, modalities: Iterable[str]) -> None:
    """Try the chains of these modalities, each of MONAI's transforms and each of ours on two small images.

    Raises:
        MedclrError: as of ``resolved``, or what an argument has led to.
    """
    config = resolved(config)
    for entry in config.chain or ():
        if entry["name"] not in OWN:
            _try_monai(entry, config.size_px)
    for name in modalities if config.chain is not None else ():
        try:
            chain = custom_chain(MODALITIES[name], config)
        except (TypeError, ValueError) as error:
            raise MedclrError(f"views.chain: an argument is of the wrong kind ({error})") from error
        for step in chain:
            if isinstance(step, MonaiTransforms):
                continue
            images = _sample(2 * config.size_px if isinstance(step, RandomResizedCrop) else config.size_px)
            try:
                out = step.apply(images, step.draw(2, np.random.RandomState(0)) | step.measure(images))
            except (TypeError, ValueError, RuntimeError, ArithmeticError, IndexError) as error:
                raise MedclrError(f"views.chain: {step.key} does not work with these arguments ({error})") from error
            if out.shape[2:] != (config.size_px, config.size_px):
                raise MedclrError(f"views.chain: {step.key} gives images of another size")


def _try_monai(entry: Entry, size_px: int) -> None:
    """At a probability of 1, so that it does what it does."""
    certain = {**entry, "prob": 1.0} if "prob" in entry else entry
    try:
        apply_here(json.dumps([dict(certain)]), _sample(size_px).numpy(), np.arange(2)[:, None])
    except MedclrError as error:
        raise MedclrError(f"{error} ({entry['name']})") from error
    except Exception as error:  # of a stranger, and whatever it is, it is about these arguments
        why = " ".join(str(error).split())
        raise MedclrError(f"views.chain: {entry['name']} does not work with these arguments ({why})") from error


def _sample(size_px: int) -> torch.Tensor:
    """Two images with something in them, [2,1,S,S] in [0,1]."""
    ramp = torch.linspace(0, 1, size_px)
    return torch.stack([ramp[:, None] * ramp, (ramp[:, None] + ramp) / 2])[:, None]


def _resolved(entry: Entry) -> dict[str, Any]:
    name, given = entry["name"], {key: value for key, value in entry.items() if key != "name"}
    kind = OWN.get(name) or _monai(name)
    accepted = inspect.signature(kind.__init__).parameters
    known = {key: value for key, value in accepted.items() if key != "self" and value.kind is not value.VAR_KEYWORD}
    takes_any = len(known) < len(accepted) - 1
    if name == CROP:
        del known["size_px"]  # is views.size_px
    for key in given:
        if key not in known and not takes_any:
            raise MedclrError(f"views.chain: {name} has no argument {key!r}{nearest(key, list(known))}")
    usual = USUAL.get(name, ())
    lacking = [
        key
        for key, value in known.items()
        if value.default is value.empty
        and key not in given
        and key not in usual
        and value.kind is not value.VAR_POSITIONAL
    ]
    if lacking:
        raise MedclrError(f"views.chain: {name} needs {' and '.join(lacking)}")
    defaults = {
        key: value.default
        for key, value in known.items()
        if key not in given and key not in usual and value.default is not value.empty and _is_plain(value.default)
    }
    return {"name": name, **given, **{key: _listed(value) for key, value in defaults.items()}}


def _monai(name: str) -> Any:
    """A random transform of MONAI.

    Raises:
        MedclrError: there is none of that name.
    """
    from monai.transforms import Compose, MapTransform, Randomizable, RandomizableTransform, Transform

    module = importlib.import_module("monai.transforms")

    def is_random(kind: Any) -> bool:
        return (
            inspect.isclass(kind)
            and issubclass(kind, Transform)
            and issubclass(kind, Randomizable)
            and not issubclass(kind, Compose | MapTransform)
            and kind is not RandomizableTransform
        )

    kind = getattr(module, name, None)
    if is_random(kind):
        return kind
    known = [*OWN, *(other for other in dir(module) if is_random(getattr(module, other)))]
    if inspect.isclass(kind) and issubclass(kind, MapTransform):
        why = "takes dictionaries, and a view is an image"
    elif inspect.isclass(kind) and issubclass(kind, Compose):
        why = "is made of other transforms, and the chain is one already"
    elif inspect.isclass(kind) and issubclass(kind, Transform):
        why = "is not random"
    else:
        why = "is neither a transform of medclr nor a random one of MONAI"
    raise MedclrError(f"views.chain: {name} {why}{nearest(name, known)}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return type(value) in (bool, int, float, str, type(None))


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def moving(chain: Sequence[BatchTransform]) -> list[str]:
    """Those of MONAI's transforms in a chain that move pixels, which no mask or point would follow."""
    module = importlib.import_module("monai.transforms")
    names = [name for step in chain if isinstance(step, MonaiTransforms) for name in step.key.split("+")]
    homes = {name: getattr(module, name).__module__ for name in names}
    return [name for name, home in homes.items() if "intensity" not in home and "Smooth" not in name]
