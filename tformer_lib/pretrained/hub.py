"""Public weights as our ``Decoder``: from a folder that is laid out as the Hugging Face hub does it, and back."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tformer_lib.checkpoint import Writer, check_kinds, check_not_quantised, settle, write_together
from tformer_lib.pretrained import int8
from tformer_lib.pretrained.families import FAMILIES
from tformer_lib.pretrained.family import Family
from tformer_lib.pretrained.fetch import fetch
from tformer_lib.pretrained.keys import Keys, read_config
from tformer_lib.pretrained.links import Link
from tformer_lib.pretrained.shards import INDEX, Shards
from tformer_lib.pretrained.tokenizer import HubEncoding
from tformer_lib.transformer import Decoder, ModelConfig

LARGEST_SHARD = 5 * 10**9
"""Bytes of tensors in one file, as transformers cuts them."""

WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
"""Names of the files that hold a model's weights."""

FLOATS = {"F64", "F32", "F16", "BF16"}
"""What safetensors calls the dtypes that weights come in; others are quantised."""


class Source(Protocol):
    """Where tensors come from: what there is, and how to read one."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor."""


class InMemory:
    """Tensors that are there already, as a :class:`Source`."""

    def __init__(self, weights: Mapping[str, Tensor]):
        check_not_quantised(weights, "the checkpoint")
        self.weights = weights
        self.shapes = {name: tuple(x.shape) for name, x in weights.items()}
        self.dtypes = dict.fromkeys(weights, "F32")

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.weights[name]


def from_hub(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Decoder:
    """A public model, ready to write.

    A folder is read where it is. Any other name is one of the hub, such as ``"Qwen/Qwen3-0.6B"``, whose files the
    huggingface_hub library fetches, or finds among those that it fetched before. Nothing of a checkpoint is executed.

    Args:
        name: a folder with ``config.json`` and ``*.safetensors``, or a name on the hub.
        dtype: of the weights in memory; as they are in the file if not given. They are then mapped, not copied.
            ``torch.int8`` keeps the matrices of the blocks in 8 bits (:mod:`tformer_lib.pretrained.int8`), the rest as
            it is in the file.
        device: where the weights go.
        revision: which version on the hub: a branch, a tag or a commit.

    Raises:
        FileNotFoundError: one of the files is missing, or the model cannot be fetched.
        ValueError: the model is of a family that is not built here, asks for what is not built, or its weights do not
            fit its configuration; the message names the key or the tensor. No weight was read then.
    """
    folder = fetch(name, revision)
    settle(folder)
    config = read_config(folder / "config.json")
    family_of(config, folder)
    return load_family(Shards(folder), config, dtype=dtype, device=device, where=folder)


def from_folder(path: Path | str, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a folder, in float32 unless asked otherwise: see :func:`from_hub`.

    Raises:
        FileNotFoundError: if one of the files is missing.
        ValueError: if the model is of a kind that is not built here, or its weights do not fit its configuration.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    return from_hub(path, dtype=dtype)


def from_tensors(weights: Mapping[str, Tensor], config: dict, *, dtype: torch.dtype | None = torch.float32) -> Decoder:
    """A model from tensors in memory, by the names that they have in a checkpoint, and its ``config.json``."""
    return load_family(InMemory(weights), config, dtype=dtype)


def load_family(
    source: Source,
    config: dict,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    where: str | Path = "the checkpoint",
) -> Decoder:
    """A decoder of a config with the source's tensors, read one after the other once all of them are known to fit.

    Args:
        source: the tensors, by the family's names.
        config: what ``config.json`` holds.
        dtype: of the weights; the source's if not given.
        device: where the weights go.
        where: what an error calls the source.
    """
    family = family_of(config, where)
    check_sizes(config, source.shapes)
    ours = read_family(family, config)
    with torch.device("meta"):
        model = Decoder(ours)
    links, names = match(family, model, source)
    small = int8.make_room(model) if dtype == torch.int8 else set()
    dtype = None if dtype == torch.int8 else dtype
    weights: dict[str, Tensor] = {}
    for link in links:
        for name, x in zip(link.ours, link.read(*(source.read(names[theirs]) for theirs in link.theirs)), strict=True):
            if name in small:
                weights[name], weights[name.removesuffix("weight") + "scale"] = int8.quantise_rows(x.to(device))
            else:  # a copy where the rest is rounded: one tensor that stays mapped keeps all of its file in memory
                weights[name] = x.to(device, x.dtype if dtype is None else dtype, copy=bool(small)).contiguous()
    if ours.tie_embeddings and (head := names.get("lm_head.weight")) is not None:
        table = links[0].theirs[0]
        if not torch.equal(source.read(head), source.read(names[table])):
            raise ValueError(f"{head} differs from {table}, which the config ties to it")
    model.load_state_dict(weights, strict=False, assign=True)
    if ours.tie_embeddings:
        model.unembedding.weight = model.embedding.tokens.weight
    return model.eval()


LAYERS = ("num_hidden_layers", "n_layer")
SIZES = re.compile("dim|size|heads?$|experts|rank|kernel|n_embd|n_inner")
"""What the keys that count layers, and those that say how long a tensor is, are called."""


def check_sizes(config: dict, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse more layers than there are tensors, and sizes beyond every tensor's, before anything is made of so many.

    Raises:
        ValueError: the message names the key.
    """
    longest, text = max((n for shape in shapes.values() for n in shape), default=0), config.get("text_config")
    for key, value in [*config.items(), *(text.items() if isinstance(text, dict) else ())]:
        if key in LAYERS and not (isinstance(value, int) and value <= len(shapes)):
            raise ValueError(f"config.json says {value!r} layers, the weights are {len(shapes)} tensors")
        if SIZES.search(key) and isinstance(value, int | float) and not value <= longest:
            raise ValueError(
                f"config.json says that {key} is {value!r}, no tensor of the weights is longer than {longest}"
            )


def family_of(config: dict, where: str | Path) -> Family:
    """The family of a config.

    Raises:
        ValueError: it is not known here; the message names those that are.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where} holds a model of type {kind!r}; {', '.join(FAMILIES)} can be read")
    return FAMILIES[kind]


def read_family(family: Family, config: dict) -> ModelConfig:
    """A config in our words; no key is left unread.

    Raises:
        ValueError: a key is missing, unknown, or has a value that makes no sense.
    """
    keys = Keys(config)
    try:
        ours = family.read(keys)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # a text where a number belongs
        raise ValueError(f"config.json has a value of the wrong kind: {error}") from error
    check_kinds(ModelConfig, vars(ours), "config.json")
    keys.finish()
    return ours


def config_from_hub(config: dict) -> ModelConfig:
    """What a ``config.json`` says in our words.

    Raises:
        ValueError: the family, or a key of it, is not known here, or asks for what is not built.
    """
    return read_family(family_of(config, "config.json"), config)


def match(family: Family, model: nn.Module, source: Source) -> tuple[list[Link], dict[str, str]]:
    """The links of a model's parameters, and which tensor of the source each of their names is; all shapes fit.

    Raises:
        ValueError: one is missing, left over, of another shape, or quantised. Nothing has been read then.
    """
    names = {name.removeprefix(family.prefix): name for name in source.shapes}
    left = {
        short
        for short in names
        if not short.endswith(family.forgotten or "\0") and not short.startswith(family.elsewhere or "\0")
    }
    if model.config.tie_embeddings:
        left.discard("lm_head.weight")
    parameters, links = dict(model.named_parameters()), []
    for link in family.links(model):
        links.append(link)
        wanted = link.write(*(parameters[name] for name in link.ours))
        for theirs, x in zip(link.theirs, wanted, strict=True):
            if theirs not in names:
                raise ValueError(f"the weights have no {theirs}")
            found = source.shapes[names[theirs]]
            if found != tuple(x.shape):
                raise ValueError(f"{theirs} should have shape {tuple(x.shape)}, and has {found}")
            if source.dtypes[names[theirs]] not in FLOATS:
                came = source.dtypes[names[theirs]]
                raise ValueError(f"{theirs} is in {came}: quantised weights cannot be read here")
            left.discard(theirs)
    if left:
        raise ValueError(f"the weights hold {', '.join(sorted(left)[:3])}, which the model has no place for")
    return links, names


# Back to the hub's layout


def to_hub(
    model: Decoder,
    folder: Path | str,
    encoding: HubEncoding | None = None,
    *,
    family: str | None = None,
    largest: int = LARGEST_SHARD,
) -> None:
    """Write a model as a folder that the hub, transformers and :func:`from_hub` read: each number as it is, bit by bit.

    Args:
        model: the decoder.
        folder: made if it is not there. Another model's weights that it holds are replaced as one.
        encoding: the model's tokenizer, whose files are copied.
        family: a ``model_type``; the first that can say what the model's config says if not given.
        largest: the most bytes of tensors in one file; several have an index.

    Raises:
        ValueError: no family, or not this one, has the model's parts.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    name, written = hub_config(model.config, family)
    theirs: dict[str, Tensor] = {}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for link in FAMILIES[name].links(model):
        tensors = link.write(*(parameters[ours] for ours in link.ours))
        theirs |= {name: x.contiguous() for name, x in zip(link.theirs, tensors, strict=True)}
    dtype = str(next(iter(theirs.values())).dtype).removeprefix("torch.")
    contents = shards_of(theirs, largest) | {"config.json": json.dumps(written | {"dtype": dtype}, indent=2).encode()}
    contents |= {} if encoding is None else encoding.files()
    before = {path.name for path in folder.glob("model*.safetensors*") if re.fullmatch(WEIGHTS, path.name)}
    write_together(folder, contents, without=before - contents.keys())


def hub_config(config: ModelConfig, family: str | None = None) -> tuple[str, dict]:
    """The family that a config belongs to, and its ``config.json``: what is read back is the config, in every field.

    Raises:
        ValueError: there is no such family, or none that has the config's parts.
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    for name in FAMILIES if family is None else (family,):
        kind = FAMILIES[name]
        if any(getattr(kind, part) != (getattr(config, part) is not None) for part in ("experts", "latent", "linear")):
            continue
        try:
            written = kind.write(config)
            found = read_family(kind, written)
        except (ValueError, KeyError):  # it has no word for a part
            continue
        if same_model(found, config):
            return name, written
    raise ValueError(f"{family or 'every family'} lacks something that this config asks for: {config}")


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    """Whether two configs say the same about what is computed; how it is computed does not matter."""
    return facts(a) == facts(b)


def facts(config: ModelConfig) -> dict:
    """What a config says about a model, with what follows from other fields written out."""
    said = {name: value for name, value in vars(config).items() if name not in ("attention", "dropout", "layer_types")}
    if config.rope_scaling is not None:
        said["rope_scaling"] = {"original_max_position_embeddings": config.max_length, **config.rope_scaling}
    elif config.window_rope_base is None:
        said["window_rope_base"] = config.rope_base
    return said | {
        "kv_heads": config.number_of_kv_heads,
        "head_dim": config.size_of_head,
        "feed_forward_width": config.size_of_feed_forward,
        "types": config.types_of_layers,
        "attention_bias": config.bias if config.attention_bias is None else config.attention_bias,
        "attention_scale": config.size_of_head**-0.5 if config.attention_scale is None else config.attention_scale,
        "final_norm": config.has_final_norm,
    }


def shards_of(tensors: dict[str, Tensor], largest: int) -> dict[str, Writer | bytes]:
    """What to write: ``model.safetensors``, or several files of at most ``largest`` bytes of tensors, and an index."""
    groups: list[dict[str, Tensor]] = [{}]
    room = largest
    for name, x in tensors.items():
        if groups[-1] and x.nbytes > room:
            groups.append({})
            room = largest
        groups[-1][name] = x
        room -= x.nbytes
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    files: dict[str, Writer | bytes] = {}
    for file, group in zip(names, groups, strict=True):  # no copy of a file is made in memory
        files[file] = partial(save_file, group)
    if len(groups) > 1:
        places = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
        files[INDEX] = json.dumps(index, indent=2).encode()
    return files


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    try:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
