"""The small model that the chapters share, those that a reader has trained, and public ones: each by its name."""

from pathlib import Path

import torch

from tformer_lib.checkpoint import build, load_weights, read_metrics, read_tensors, require
from tformer_lib.pretrained.fetch import fetch, is_hub_name
from tformer_lib.pretrained.hub import from_hub
from tformer_lib.pretrained.int8 import quantise
from tformer_lib.pretrained.tokenizer import HubEncoding, load_tokenizer, read_json
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


def load(
    name: str | Path = "stories", *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Decoder, Encoding | HubEncoding]:
    """A trained model, ready to write, and the encoding of its tokens.

    Args:
        name: one of :func:`names`, the folder of a run of ``python -m tformer_lib.training``, or a public model: a
            folder that is laid out as the hub does it, or a name on the hub.
        device: where the weights go.
        dtype: of the weights; as they are in the file if not given, and ``torch.int8`` for 8 bits in the blocks.

    Raises:
        ValueError: if there is no such model, or it is of a family that is not built here.
        OSError: if one of its files is missing, or it cannot be fetched.
    """
    if not str(name):
        raise ValueError("the name of a model must not be empty")
    if is_public(name):
        place = fetch(name)
        return from_hub(place, device=device, dtype=dtype), load_tokenizer(place)
    place = folder(name)
    file = place / ("model.safetensors" if name in names() else "best.safetensors")
    weights, facts = read_tensors(file)
    require(facts, {"config"}, str(file))
    model = Decoder(build(ModelConfig, facts["config"]["model"], f"{place.name}/{file.name}"))
    load_weights(model, weights, f"{place.name}/{file.name}")
    model = quantise(model) if dtype == torch.int8 else model.to(dtype=dtype)
    return model.to(device).eval(), load_encoding(place)


def is_public(name: str | Path) -> bool:
    """Whether a model is one of the hub's kind: a folder whose ``config.json`` says so, or a name on the hub."""
    if Path(name).is_dir():
        return "model_type" in read_json(Path(name) / "config.json")
    return name not in names() and is_hub_name(name)


def log(name: str = "stories") -> list[dict]:
    """Every measurement of that model's training, as in a run's ``metrics.jsonl``."""
    return read_metrics(folder(name) / "metrics.jsonl")


def facts(name: str = "stories") -> dict:
    """What the weights say about themselves: the training configuration, the step, the corpus, the validation loss."""
    return read_tensors(folder(name) / "model.safetensors")[1]
