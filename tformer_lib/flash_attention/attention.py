"""The public door of flash attention: checks what comes in, and calls the operator."""

import torch
from torch import Tensor

from tformer_lib.contract import check_bias, check_inputs, has_no_numbers, score_scale
from tformer_lib.flash_attention import operators, plans
from tformer_lib.flash_attention.checks import Window, check_options, check_packed
from tformer_lib.flash_attention.kernels import LADDER
from tformer_lib.flash_attention.options import Options, Packing, options_of
from tformer_lib.ladder import check_no_tangent


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    step: int | str | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v in O(T + S) memory, under the attention contract (``tformer_lib.contract``).

    Args:
        q: (batch, heads, T, head_dim), any strides.
        k: (batch, kv_heads, S, head_dim); kv_heads divides heads.
        v: (batch, kv_heads, S, value_dim).
        mask: boolean, broadcastable to (batch, heads, T, S), True where a query may look. The kernels know causal and
            window alone, so any other mask runs step 0 (on a GPU with a warning: it is slower).
        causal: a query sees no later key; the last query sees the last key.
        scale: of the scores, head_dim ** -0.5 if not given.
        window: a number: a query sees itself and the ``window - 1`` keys before it; implies causal. A pair
            (left, right): it sees so many keys before and after its own position, None of a side for no bound.
        softcap: scores become ``softcap * tanh(score / softcap)``, which keeps them between -softcap and softcap.
        alibi_slopes: (heads,) or (batch, heads) float32: a score loses its head's slope times the distance of the key
            from the query's own position, ALiBi (arXiv:2108.12409). It has no gradient.
        bias: floating-point, broadcastable to (batch, heads, T, S): is added to the scores after they were capped.
            Kernels read it as float32. Where it wants a gradient, all gradients are step 0's. A key is hidden by -inf.
            A large finite number, such as -1e9, hides it only beside others that are seen: of a row that sees no more
            than such keys, float32 keeps neither the scores nor, in lse and gradients, how many keys there are.
        step: which implementation, see the table above; the top one that can do it if not given.
        return_lse: return the log-sum-exp of every row's scores too.
        deterministic: the same bits of dq in every run, on a GPU at some cost in speed; follows
            ``torch.use_deterministic_algorithms`` if not given. The forward always is.

    Returns:
        out, (batch, heads, T, value_dim) of q's dtype, a row that sees no key is zero; with ``return_lse`` also lse,
        (batch, heads, T) float32 (float64 for float64 inputs), -inf for such a row.

    Raises:
        ValueError: the inputs break the contract, or the step cannot do what is asked.
        NotImplementedError: a forward-mode derivative is asked for, which no step has.
        tformer_lib.jit.BuildError: the step's kernel cannot be built here; the message says what to install.

    A kernel reads q, k and v where they lie, by their strides. The tensor-core steps load 16 bytes at a time: a tensor
    whose columns are not adjacent or whose rows are not 16-byte aligned is copied first. The first call of a layout
    checks it and chooses a step; those after it go by the plan that it left (``tformer_lib.flash_attention.plans``).
    """
    deterministic = is_deterministic(deterministic)
    key = None
    if mask is None and bias is None:
        key = plans.key_of((q, k, v, alibi_slopes, None, None), window, (causal, scale, softcap, step, deterministic))
        if key is not None and (plan := plans.find(key)) is not None:
            return run_planned(plan, return_lse, q, k, v, alibi_slopes, None, None)
    check_inputs(q, k, v, mask)
    check_options(q, window, softcap, alibi_slopes)
    if bias is not None:
        check_bias(bias, q, k)
    check_no_tangent("flash attention", q, k, v, instead="attention.attend")
    given = {"softcap": softcap, "alibi_slopes": alibi_slopes, "bias": bias, "deterministic": deterministic}
    options = options_of(causal, float(score_scale(scale, q.shape[-1])), window, **given)
    name = LADDER.name(step)
    out, lse = operate(q, k, v, mask, None, options, name)
    if key is not None:
        plans.keep(key, lambda: plans.make_plan(q, k, v, options, None, name, checked=False))
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    step: int | str | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    checked: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of several sequences packed end to end, each over its own keys alone.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, kv_heads, head_dim).
        v: (total_k, kv_heads, value_dim).
        cu_seqlens_q: (batch + 1,) int32, where each sequence's queries begin; the last entry is total_q.
        cu_seqlens_k: (batch + 1,) int32, the same of the keys. A sequence may be empty.
        max_seqlen_q, max_seqlen_k: the longest lengths; read from the tensors if not given, which waits for the GPU.
            What these four say is checked on a CPU; on a GPU that would wait for it, so there they are believed.
        checked: check them on a GPU too.

    Returns:
        out (total_q, heads, value_dim), and with ``return_lse`` lse (heads, total_q). The other arguments, and what is
        raised, are those of :func:`flash_attention`; the batch of alibi_slopes counts the packed sequences.
    """
    deterministic = is_deterministic(deterministic)
    if max_seqlen_q is None or max_seqlen_k is None:
        check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
        max_seqlen_q = longest(cu_seqlens_q, q) if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = longest(cu_seqlens_k, k) if max_seqlen_k is None else max_seqlen_k
    given = (causal, scale, softcap, step, deterministic, max_seqlen_q, max_seqlen_k, checked)
    key = plans.key_of((q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k), window, given)
    plan = None if key is None else plans.find(key)
    if plan is not None:
        q4, k4, v4 = map(as_batch, (q, k, v))
        found = run_planned(plan, return_lse, q4, k4, v4, alibi_slopes, cu_seqlens_q, cu_seqlens_k)
        return (found[0][0].transpose(0, 1), found[1][0]) if return_lse else found[0].transpose(0, 1)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    q4, k4, v4 = map(as_batch, (q, k, v))
    check_inputs(q4, k4, v4)
    check_options(q4, window, softcap, alibi_slopes, cu_seqlens_q.shape[0] - 1)
    check_no_tangent("flash attention", q, k, v, instead="attention.attend")
    form = {"softcap": softcap, "alibi_slopes": alibi_slopes, "deterministic": deterministic}
    options = options_of(causal, float(score_scale(scale, q.shape[-1])), window, **form)
    packing, name = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), LADDER.name(step)
    out, lse = operate(q4, k4, v4, None, packing, options, name, checked)
    if key is not None:
        plans.keep(key, lambda: plans.make_plan(q4, k4, v4, options, packing, name, checked))
    out, lse = out[0].transpose(0, 1), lse[0]  # (total_q, heads, value_dim), (heads, total_q)
    return (out, lse) if return_lse else out


def operate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    packing: Packing | None,
    options: Options,
    step: str,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Call the operator."""
    packed = (None, None, q.shape[2], k.shape[2])
    if packing is not None:
        packed = (packing.cu_seqlens_q, packing.cu_seqlens_k, packing.max_seqlen_q, packing.max_seqlen_k)
    return torch.ops.tformer_lab.flash_attention(
        q,
        k,
        v,
        mask,
        *packed,
        options.causal,
        options.window,
        options.scale,
        step,
        options.deterministic,
        checked,
        options.ahead,
        options.softcap,
        options.alibi_slopes,
        options.bias,
    )


def run_planned(
    plan: plans.Plan, with_lse: bool, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """A planned call, with a node for autograd where a gradient is wanted."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return operators.Planned.apply(plan, with_lse, q, k, v, *others)
    found = plan.run(q, k, v, others)
    return found if with_lse else found[0]


def as_batch(x: Tensor) -> Tensor:
    """(total, heads, d) -> (1, heads, total, d)."""
    return x.transpose(0, 1).unsqueeze(0)


def longest(cu_seqlens: Tensor, x: Tensor) -> int:
    """The length of the longest sequence packed in x; all of x, where ``cu_seqlens`` is a shape without numbers."""
    if not torch.compiler.is_compiling() and has_no_numbers(cu_seqlens):
        return x.shape[0]
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def is_deterministic(wish: bool | None) -> bool:
    """What the caller wishes, or torch's global setting."""
    return torch.are_deterministic_algorithms_enabled() if wish is None else wish
