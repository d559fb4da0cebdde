"""Trained models: the small one that the chapters share, and public weights that are on your disk.

    model, encoding = pretrained.load()                 # writes stories; offline, a few milliseconds
    model = pretrained.from_folder("path/to/llama")     # GPT-2 or Llama: config.json and *.safetensors

The small model was trained on ``stories`` by ``python -m tformer_lib.training train --preset stories``. Its weights,
its configuration, its tokenizer and the log of its training lie in ``tformer_lib/weights/stories/``.
"""

from tformer_lib.pretrained.hub import from_folder, from_gpt2, from_llama
from tformer_lib.pretrained.shipped import facts, folder, load, log, names

__all__ = ["facts", "folder", "from_folder", "from_gpt2", "from_llama", "load", "log", "names"]
