"""The Transformer: the encoder-decoder of the paper, and the decoder-only model that grew out of it.

One :class:`Block` serves every model here: GPT-2's (LayerNorm, GELU, learned positions), Llama's (RMSNorm, SwiGLU,
RoPE, grouped queries) and the paper's encoder and decoder (ReLU, sinusoids, cross-attention). A :class:`ModelConfig`
says which.

Each topic has a room: ``config`` (the settings), ``blocks`` (block, stack, embedding), ``decoder``, ``encoder_decoder``
and ``evaluation``.

Sources: Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762); Radford et al. 2019 (GPT-2);
Touvron et al. 2023 (Llama, arXiv:2302.13971); Shazeer 2020, "GLU Variants Improve Transformer" (arXiv:2002.05202);
Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv:1910.07467).
"""

from tformer_lib.transformer.blocks import (
    Block,
    Embedding,
    FeedForward,
    Stack,
    check_tokens,
    initialise,
    make_feed_forward,
    make_norm,
)
from tformer_lib.transformer.config import (
    ACTIVATIONS,
    ATTENTION_FORMS,
    LinearConfig,
    ModelConfig,
    attention_form,
    make_rope,
)
from tformer_lib.transformer.decoder import Decoder, count_parameters
from tformer_lib.transformer.encoder_decoder import EncoderDecoder, label_smoothed_loss
from tformer_lib.transformer.evaluation import all_modules, evaluating

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_FORMS",
    "Block",
    "Decoder",
    "Embedding",
    "EncoderDecoder",
    "FeedForward",
    "LinearConfig",
    "ModelConfig",
    "Stack",
    "all_modules",
    "attention_form",
    "check_tokens",
    "count_parameters",
    "evaluating",
    "initialise",
    "label_smoothed_loss",
    "make_feed_forward",
    "make_norm",
    "make_rope",
]
