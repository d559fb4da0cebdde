"""The small model that the chapters share, and those that a reader has trained."""

from pathlib import Path

import torch

from tformer_lib.checkpoint import build, load_weights, read_metrics, read_tensors, require
from tformer_lib.tokens import Encoding, load_encoding
from tformer_lib.transformer import Decoder, ModelConfig

WEIGHTS = Path(__file__).parents[1] / "weights"


def names() -> list[str]:
    """The models that come with the library."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/model.safetensors"))


def folder(name: str | Path = "stories") -> Path:
    """Where that model's files are: of one of :func:`names`, or of a run, which is called by its folder.

    Raises:
        ValueError: if there is no such model; the message lists those there are.
    """
    if name in names():
        return WEIGHTS / name
    if not Path(name).is_dir():
        known = ", ".join(names()) or "none"
        raise ValueError(f"there is no pretrained model {str(name)!r}, nor a folder of that name; there are {known}")
    return Path(name)


def load(name: str | Path = "stories", *, device: torch.device | str = "cpu") -> tuple[Decoder, Encoding]:
    """A trained model, ready to write, and the encoding of its tokens.

    Args:
        name: one of :func:`names`, or the folder of a run of ``python -m tformer_lib.training``.
        device: where the weights go.

    Raises:
        ValueError: if there is no such model.
        OSError: if one of its files is missing.
    """
    place = folder(name)
    file = place / ("model.safetensors" if name in names() else "best.safetensors")
    weights, facts = read_tensors(file)
    require(facts, {"config"}, str(file))
    model = Decoder(build(ModelConfig, facts["config"]["model"], f"{place.name}/{file.name}"))
    load_weights(model, weights, f"{place.name}/{file.name}")
    return model.to(device).eval(), load_encoding(place)


def log(name: str = "stories") -> list[dict]:
    """Every measurement of that model's training, as in a run's ``metrics.jsonl``."""
    return read_metrics(folder(name) / "metrics.jsonl")


def facts(name: str = "stories") -> dict:
    """What the weights say about themselves: the training configuration, the step, the corpus, the validation loss."""
    return read_tensors(folder(name) / "model.safetensors")[1]
