"""The peers that medclr is measured against, in an environment of their own: kornia, torchvision, lightly.

    from peers import peers
    python = peers(folder)      # a Python that has them, and all that this one has

medclr needs none of them, so they stay out of its environment. Theirs is made once, in about a minute, from the package
index, and sees this one's packages behind its own: both sides run on the same torch.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import torch

PACKAGES = (
    "kornia==0.9.0",
    "kornia_rs==0.2.0",
    "lightly==1.6.0",
    "lightly_utils==0.0.2",
    "lightning-utilities",
    "tqdm",
)
"""Installed without what they depend on: torch, numpy and Pillow are here, their trainers are not measured."""

OPERATORS = """import torch as _torch  # added by peers.py
_operators = _torch.library.Library("torchvision", "DEF")
_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""torchvision's wheel is built for CUDA. Beside a torch for CPUs its compiled part does not load, and it fails at the
declaration of operators of detection; declared by name, all the rest of it works, its transforms among it."""


def peers(folder: Path | str | None = None) -> Path:
    """A Python in ``folder`` that imports kornia, torchvision and lightly; it is made if it is not there yet.

    Args:
        folder: of the environment; None: one in the folder of temporary files, used again by the next call.
    """
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"medclr-peers-{os.getuid()}-{torch.__version__}"
    folder = Path(folder)
    python, done = folder / "bin" / "python", folder / "done"
    if done.exists():
        return python
    print(f"making an environment for the peers in {folder}", file=sys.stderr)
    venv.create(folder, with_pip=False, clear=True, symlinks=True)
    here = Path(sysconfig.get_path("purelib"))
    there = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (there / "behind.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n")
    torchvision = f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.0"  # the one that goes with this torch
    install = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*install, torchvision, *PACKAGES], check=True)
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        module = there / "torchvision" / "__init__.py"
        module.write_text(OPERATORS + module.read_text())
    subprocess.run([python, "-c", "import kornia, torchvision, lightly.transforms"], check=True)
    done.touch()
    return python


if __name__ == "__main__":
    print(peers(*sys.argv[1:2]))
