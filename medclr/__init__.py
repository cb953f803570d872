"""medclr: contrastive pretraining on unlabelled hospital scans.

The public API is the verbs of the command line as functions, with ``load_encoder`` and ``read_views`` for own code.
Each is imported when first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = {
    "index": "medclr.data.index",
    "whereis": "medclr.data.whereis",
    "rekey": "medclr.data.rekey",
    "prepare": "medclr.data.prepare",
    "verify": "medclr.data.store",
    "dedup": "medclr.data.dedup",
    "describe": "medclr.describe",
    "plan": "medclr.plan",
    "pretrain": "medclr.pretrain",
    "finetune": "medclr.finetune",
    "distill": "medclr.distill",
    "predict": "medclr.predict",
    "probe": "medclr.probe",
    "compare": "medclr.compare",
    "embed": "medclr.embed",
    "load_encoder": "medclr.models.encoder",
    "read_views": "medclr.embed",
    "demo": "medclr.demo",
}

__all__ = [
    "__version__",
    "compare",
    "dedup",
    "demo",
    "describe",
    "distill",
    "embed",
    "finetune",
    "index",
    "load_encoder",
    "plan",
    "predict",
    "prepare",
    "pretrain",
    "probe",
    "read_views",
    "rekey",
    "verify",
    "whereis",
]

if TYPE_CHECKING:
    from medclr.compare import compare as compare
    from medclr.data.dedup import dedup as dedup
    from medclr.data.index import index as index
    from medclr.data.prepare import prepare as prepare
    from medclr.data.rekey import rekey as rekey
    from medclr.data.store import verify as verify
    from medclr.data.whereis import whereis as whereis
    from medclr.demo import demo as demo
    from medclr.describe import describe as describe
    from medclr.distill import distill as distill
    from medclr.embed import embed as embed
    from medclr.embed import read_views as read_views
    from medclr.finetune import finetune as finetune
    from medclr.models.encoder import load_encoder as load_encoder
    from medclr.plan import plan as plan
    from medclr.predict import predict as predict
    from medclr.pretrain import pretrain as pretrain
    from medclr.probe import probe as probe


class _Package(types.ModuleType):
    """``medclr.pretrain`` is a function, and a module of that name holds it: the function wins in any order."""

    def __getattr__(self, name: str) -> Any:
        if name not in _API:
            raise AttributeError(f"module 'medclr' has no attribute {name!r}")
        value = getattr(importlib.import_module(_API[name]), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _API and isinstance(value, types.ModuleType)):  # the import system binds submodules here
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
