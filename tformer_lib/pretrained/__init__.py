"""Trained models: the small one that the chapters share, and public weights.

    model, encoding = pretrained.load()                     # writes stories; offline, a few milliseconds
    model, encoding = pretrained.load("path/to/a/folder")   # or a name on the Hugging Face hub: "Qwen/Qwen3-0.6B"
    model = pretrained.from_hub("path/to/a/folder", dtype=torch.bfloat16)   # the same without its tokenizer
    pretrained.to_hub(model, "path/to/another")             # config.json and *.safetensors, which transformers reads

The small model was trained on ``stories`` by ``python -m tformer_lib.training train --preset stories``. Its weights,
its configuration, its tokenizer and the log of its training lie in ``tformer_lib/weights/stories/``.

Each topic has a room: ``shipped`` (that model, and any by its name), ``fetch`` (where files are), ``hub`` (from a
folder to a ``Decoder`` and back), ``families`` (the table of them), ``family``, ``words``, ``dense``, ``mixtures`` and
``hybrids`` (what their config.json says in our words, and what their tensors are called), ``links`` (between their
tensors and our parameters), ``keys`` (a config whose keys are all read), ``shards`` (safetensors files), ``tokenizer``
(with its chat template), ``int8`` (small weights), ``interface`` (our attention in the models of transformers) and
``published`` (facts about public models).
"""

from tformer_lib.pretrained.families import FAMILIES
from tformer_lib.pretrained.hub import (
    config_from_hub,
    from_folder,
    from_hub,
    from_tensors,
    hub_config,
    to_hub,
)
from tformer_lib.pretrained.int8 import quantise
from tformer_lib.pretrained.keys import read_config
from tformer_lib.pretrained.published import PUBLISHED, Published
from tformer_lib.pretrained.shards import Shards
from tformer_lib.pretrained.shipped import facts, folder, load, log, names
from tformer_lib.pretrained.tokenizer import HubEncoding, load_tokenizer

__all__ = [
    "FAMILIES",
    "HubEncoding",
    "PUBLISHED",
    "Published",
    "Shards",
    "config_from_hub",
    "hub_config",
    "facts",
    "folder",
    "from_folder",
    "from_hub",
    "from_tensors",
    "load",
    "load_tokenizer",
    "log",
    "names",
    "quantise",
    "read_config",
    "to_hub",
]
