"""Our attention in the models of transformers: ``attn_implementation="tformer"``.

    from tformer_lib.pretrained.interface import register_with_transformers

    register_with_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="tformer")

transformers asks for attention by a name, and hands over queries, keys and values in the shapes of our contract. What
it hands over beside them (a scale, a soft cap, sinks) is what :class:`tformer_lib.attention.AttentionVariant` takes.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tformer_lib.attention import AttentionVariant
from tformer_lib.flash_attention import flash_attention

NAME = "tformer"
"""What is given to transformers as ``attn_implementation``. There is no "flash" in it: models take every such name for
one of the packages of FlashAttention, and would hand over packed sequences, or none of the masks that they need."""

FLASH = "tformer_flash"
"""The same attention by a name that says what it is. Models that look for "flash" in a name themselves, as Llama 4 does
past its first chunk, run under :data:`NAME` alone."""

UNKNOWN = ("sinks", "indices", "block_indices")
"""What some layers hand over and only their own attention knows. Other words are for the loss, or say how masks are."""


def register_with_transformers() -> None:
    """Let transformers find :func:`tformer_lib.flash_attention.flash_attention` by :data:`NAME` or :data:`FLASH`.

    Raises:
        ImportError: transformers is missing.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
    except ImportError:
        raise ImportError("to run in its models, pip install 'tformer-lab[transformers]'") from None
    for name in (NAME, FLASH):
        AttentionInterface.register(name, attend_for_transformers)
        AttentionMaskInterface.register(name, mask_for_transformers)
    asks_for_package = inspect.unwrap(modeling_utils.is_flash_attention_requested)  # as it was before an earlier call
    modeling_utils.is_flash_attention_requested = other_than_ours(asks_for_package)


def other_than_ours(asks_for_package: Callable[..., bool]) -> Callable[..., bool]:
    """Whether a model asks for one of the packages of FlashAttention, which :data:`FLASH` is not.

    transformers takes every name that holds "flash" for such a package. It would look for ours among them when a
    model is made, and not find it.

    Args:
        asks_for_package: transformers' own function.
    """

    @functools.wraps(asks_for_package)
    def asks(config=None, requested_attention_implementation: str | None = None, **options) -> bool:
        return requested_attention_implementation != FLASH and asks_for_package(
            config, requested_attention_implementation, **options
        )

    return asks


def attend_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer, which may say ``is_causal``.
        query: (batch, heads, T, head_dim).
        key, value: (batch, kv_heads, S, head_dim).
        attention_mask: what :func:`mask_for_transformers` made: None where causality says it all, which is what the
            kernels know; else boolean, (batch, 1, T, S), which the reference computes. A mask of the caller's own may
            hold numbers, which are added to the scores.
        dropout: the share of weights dropped.
        scaling: what scores are multiplied by.
        is_causal: whether the future is hidden where there is no mask; the module's if not given.
        softcap, s_aux: a soft cap, and a sink for each head.
        position_bias: broadcastable to (batch, heads, T, S), is added to the scores (T5).

    Returns:
        (batch, T, heads, head_dim), and None in place of weights, which are never made.

    Raises:
        ValueError: the layer hands over something that would change the result and is not known here.
    """
    if unknown := [name for name in UNKNOWN if others.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} hands over {', '.join(unknown)}, which {NAME} does not know")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = attention_mask is None and causal
    bias = position_bias
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        bias, attention_mask = attention_mask if bias is None else bias + attention_mask, None
    given = {"softcap": softcap, "sinks": s_aux, "bias": bias, "dropout": dropout}
    variant = AttentionVariant(flash_attention, scale=scaling, **given)
    out = variant(query, key, value, mask=attention_mask, causal=causal)
    return out.transpose(1, 2).contiguous(), None


def mask_for_transformers(*args, **options) -> Tensor | None:
    """The mask as transformers' own SDPA takes it, or None where the pass is causal and nothing else.

    SDPA's ``is_causal`` is aligned to the top left, so transformers makes a mask for a pass of several tokens over a
    cache. Ours is aligned to the bottom right, so that such a pass needs none.
    """
    from transformers.masking_utils import sdpa_mask

    if is_plainly_causal(**options):
        return None
    return sdpa_mask(*args, **options | {"allow_is_causal_skip": False})


def is_plainly_causal(
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_,
) -> bool:
    """Whether the last query stands on the last key, nothing is padded, and no window is shorter than the text."""
    if not allow_is_causal_skip or q_length is None or kv_length is None:
        return False
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        return False
    if local_size is not None and kv_length > local_size:
        return False
    return attention_mask is None or bool(attention_mask[:, kv_offset : kv_offset + kv_length].all())
