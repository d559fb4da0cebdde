"""Decoding: a state of fixed size instead of a KV cache. Its size does not depend on how many tokens there were."""

from collections.abc import Callable

from torch import Tensor

from tformer_lib.contract import in_named_dtypes
from tformer_lib.linear_attention.feature_maps import FeatureMap, elu_plus_one
from tformer_lib.linear_attention.forms import delta_attend, gated_attend, goes_to_kernels, sum_by_kernels
from tformer_lib.linear_attention.shared import CHUNK, first_state
from tformer_lib.linear_attention.sums import checked_features, finish, scan_chunks


class LinearState:
    """One layer's memory under ``attend``: the sums over all tokens so far.

    Args:
        feature_map, scale, normalised, chunk: as in ``attend``.

    Attributes:
        sums: None before the first token, then (batch, kv_heads, features, value_dim + 1) in float32 or float64; the
            last column, the sum of the keys, is there where the output is normalised.
    """

    def __init__(
        self,
        *,
        feature_map: FeatureMap = elu_plus_one,
        scale: float | None = None,
        normalised: bool = True,
        chunk: int = CHUNK,
    ):
        self.feature_map, self.scale, self.normalised, self.chunk = feature_map, scale, normalised, chunk
        self.sums: Tensor | None = None

    @in_named_dtypes
    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, attend: Callable | None = None, mask: Tensor | None = None):
        """Add T new tokens and return their causal outputs (batch, heads, T, value_dim): prefill and decode alike.

        Args:
            q, k, v: as in the module's ``attend``, with T = S: only the new tokens.
            attend: ignored; a KV cache takes one here, and this state holds nothing another form could read.
            mask: key padding of the new tokens, broadcastable to (batch, 1, 1, T).
        """
        check_new_tokens(q, k)
        options = (self.scale, self.feature_map, self.normalised)
        if q.dim() == 4 and goes_to_kernels(q, mask, self.feature_map, None):
            out, self.sums = sum_by_kernels(q, k, v, *options, initial_state=self.sums)
            return out
        phi_q, phi_k, values = checked_features(q, k, v, mask, *options)
        sums = first_state(self.sums, phi_k, values.shape[3])
        out, self.sums = scan_chunks(phi_q, phi_k, values, sums, self.chunk)
        return finish(out, q.dtype, self.normalised)


class GatedState:
    """One layer's memory under ``gated_attend`` and ``delta_attend``: the state after all tokens so far.

    Args:
        scale, chunk: as there.

    Attributes:
        state: None before the first token, then (batch, kv_heads, head_dim, value_dim) in float32 or float64.
    """

    def __init__(self, *, scale: float | None = None, chunk: int | None = None):
        self.scale, self.chunk = scale, chunk
        self.state: Tensor | None = None

    @in_named_dtypes
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None
    ) -> Tensor:
        """Take T new tokens in and return their outputs (batch, heads, T, value_dim): prefill and decode alike.

        Args:
            q, k, v: only the new tokens.
            log_decay: of the new tokens, as in ``gated_attend``; may be None under the delta rule.
            beta: the delta rule's step sizes, as in ``delta_attend``; None is the decaying sum.

        Raises:
            ValueError: neither a decay nor a step size is given, or the tokens do not fit the state.
        """
        check_new_tokens(q, k)
        if beta is None and log_decay is None:
            raise ValueError("a gated state needs log_decay, or beta for the delta rule, or both; got neither")
        options = {"scale": self.scale, "chunk": self.chunk, "initial_state": self.state, "return_state": True}
        if beta is None:
            out, self.state = gated_attend(q, k, v, log_decay=log_decay, **options)
        else:
            out, self.state = delta_attend(q, k, v, beta=beta, log_decay=log_decay, **options)
        return out


def check_new_tokens(q: Tensor, k: Tensor) -> None:
    """Refuse a call that brings old keys along."""
    if q.dim() == 4 and k.dim() == 4 and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"a state takes new tokens only, expected as many queries as keys, got {q.shape[2]} and {k.shape[2]}"
        )
