"""Training: from a random network and a corpus to a model that writes.

One dataclass, :class:`TrainingConfig`, says everything about a run; :class:`Run` is a run in progress. On the command
line (``python -m tformer_lib.training --help``):

    python -m tformer_lib.training train --preset quick        # a preset, any field of which a flag changes
    python -m tformer_lib.training resume --out runs/quick     # go on after Ctrl-C, a crash or a power cut
    python -m tformer_lib.training sample --out runs/quick --prompt "Once"

A run's folder holds ``config.json``, the tokenizer, ``metrics.jsonl`` (one line per measurement), ``best.safetensors``
(the weights with the lowest validation loss so far) and ``checkpoint.safetensors``: weights, optimizer, random states
and the place in the data in one file. That file is replaced in one step, so a run killed at any moment goes on exactly
where its last checkpoint was. Nothing here is pickled.

Each topic has a room: ``config`` (settings and presets), ``data`` (windows of text), ``optimizer``, ``loss``,
``cross_entropy``, ``machine`` (device, random numbers, signals), ``run`` and ``command``. Files are written by
:mod:`tformer_lib.checkpoint`.

Sources: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization" (arXiv:1711.05101); Karpathy's nanoGPT,
whose schedule, decay groups and recipes for Shakespeare are followed; Chowdhery et al. 2022, PaLM (arXiv:2204.02311),
appendix B, for the count of floating-point operations.
"""

from tformer_lib.checkpoint import load_weights, read_metrics, read_tensors, save_weights, weights_of, write_atomically
from tformer_lib.training.command import main
from tformer_lib.training.config import PRESETS, TrainingConfig, config_from_dict, difference, llama_like, preset
from tformer_lib.training.cross_entropy import chunked_cross_entropy
from tformer_lib.training.data import (
    IGNORED,
    beginning,
    end_of_document,
    entropy_floor,
    evaluation_windows,
    fingerprint,
    fit_to_corpus,
    read_windows,
    replace_some,
    whole_documents,
    window_starts,
)
from tformer_lib.training.loss import (
    accumulate_gradient,
    estimate_flops_per_token,
    evaluate,
    mean_cross_entropy,
    next_token_loss,
    training_loss,
)
from tformer_lib.training.machine import interrupts, random_states, restore_random_states, seed_all
from tformer_lib.training.optimizer import learning_rate, make_optimizer, parameter_groups
from tformer_lib.training.run import Progress, Run, sample_text, train

__all__ = [
    "IGNORED",
    "PRESETS",
    "Progress",
    "Run",
    "TrainingConfig",
    "accumulate_gradient",
    "beginning",
    "chunked_cross_entropy",
    "config_from_dict",
    "difference",
    "end_of_document",
    "entropy_floor",
    "estimate_flops_per_token",
    "evaluate",
    "evaluation_windows",
    "fingerprint",
    "fit_to_corpus",
    "interrupts",
    "learning_rate",
    "llama_like",
    "load_weights",
    "main",
    "make_optimizer",
    "mean_cross_entropy",
    "next_token_loss",
    "parameter_groups",
    "preset",
    "random_states",
    "read_metrics",
    "read_tensors",
    "read_windows",
    "replace_some",
    "restore_random_states",
    "sample_text",
    "save_weights",
    "seed_all",
    "train",
    "training_loss",
    "weights_of",
    "whole_documents",
    "window_starts",
    "write_atomically",
]
