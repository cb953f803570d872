"""The first layer of the projection head of a pretraining run: where SimCLRv2 fine-tunes from (arXiv 2006.10029)."""

from pathlib import Path

from torch import nn

from medclr import checkpoint
from medclr.errors import MedclrError, one_line


def load_first_layer(layer: nn.Module, run: Path) -> list[str]:
    """Fill a Linear and batch norm with the first hidden layer of the head in ``run``; names of its tensors.

    Raises:
        MedclrError: the run kept no head, or one of another size.
    """
    folder = checkpoint.encoder_folder(run)
    kept = checkpoint.read_head(folder)
    if kept is None:
        raise MedclrError(f"{folder}: kept no projection head; classify.layer must be encoder, or pretrain again")
    tensors = {name.removeprefix("hidden.0."): t for name, t in kept[0].items() if name.startswith("hidden.0.")}
    try:
        layer.load_state_dict(tensors)
    except RuntimeError as error:
        raise MedclrError(
            f"{folder}: its projection head is of another size ({one_line(error)}); pretrain again"
        ) from error
    return [f"first.{name}" for name in tensors]
