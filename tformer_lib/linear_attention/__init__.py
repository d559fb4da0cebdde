"""Linear attention: replace exp(q·k) by φ(q)·φ(k), and the sum over keys can be taken before any query arrives.

Softmax attention gives key s the weight exp(q·k_s). If the weight is instead an inner product of features,

    o_t = Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s) = φ(q_t)·[Σ_s φ(k_s) v_sᵀ] / φ(q_t)·[Σ_s φ(k_s)],

the brackets are one (features x value_dim) matrix and one vector, whatever the number of keys: O(N·D·d) time for N
tokens and D features, O(D·d) memory for decoding. That matrix is the state, and the members of the family differ in how
a token changes it:

=================== =========================================== ============================================
member              S_t                                         here
=================== =========================================== ============================================
sum                 S_{t-1} + k_t v_tᵀ                          ``sums``: with and without the denominator
decaying sum        a_t S_{t-1} + k_t v_tᵀ                      ``decay``: retention, GLA, Mamba-2
delta rule          (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ   ``delta``
gated delta rule    the same of a_t S_{t-1}                     ``delta``: Qwen3-Next, Kimi Linear
=================== =========================================== ============================================

Features and states are kept in float32 (float64 for float64 inputs) whatever the dtype of q: a running sum in bfloat16
stops growing at 256 times its addend.

Sources: Katharopoulos et al. 2020, "Transformers are RNNs"; Choromanski et al. 2021, "Rethinking Attention with
Performers" (FAVOR+); Sun et al. 2023, "Retentive Network"; Yang et al. 2024, "Gated Linear Attention Transformers";
Dao and Gu 2024, "Transformers are SSMs"; Schlag et al. 2021, "Linear Transformers Are Secretly Fast Weight
Programmers"; Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"; Yang,
Kautz and Hatamizadeh 2025, "Gated Delta Networks"; Kimi Team 2025, "Kimi Linear".
"""

from tformer_lib.linear_attention.decay import (
    gated_chunked,
    gated_parallel,
    gated_recurrent,
    retention_log_decay,
    scan_decayed,
)
from tformer_lib.linear_attention.delta import delta_chunked, delta_recurrent, scan_delta
from tformer_lib.linear_attention.feature_maps import (
    FeatureMap,
    RandomFeatures,
    draw_projection,
    elu_plus_one,
    relu,
    taylor,
)
from tformer_lib.linear_attention.forms import attend, delta_attend, gated_attend
from tformer_lib.linear_attention.layer import (
    GatedDeltaLayer,
    KimiDeltaLayer,
    LayerState,
    weights_from_checkpoint,
)
from tformer_lib.linear_attention.shared import CHUNK
from tformer_lib.linear_attention.states import GatedState, LinearState
from tformer_lib.linear_attention.sums import (
    associative,
    chunked,
    chunked_packed,
    parallel,
    recurrent,
    scan_chunks,
)

__all__ = [
    "CHUNK",
    "FeatureMap",
    "GatedDeltaLayer",
    "GatedState",
    "KimiDeltaLayer",
    "LayerState",
    "LinearState",
    "RandomFeatures",
    "associative",
    "attend",
    "chunked",
    "chunked_packed",
    "delta_attend",
    "delta_chunked",
    "delta_recurrent",
    "draw_projection",
    "elu_plus_one",
    "weights_from_checkpoint",
    "gated_attend",
    "gated_chunked",
    "gated_parallel",
    "gated_recurrent",
    "parallel",
    "recurrent",
    "relu",
    "retention_log_decay",
    "scan_chunks",
    "scan_decayed",
    "scan_delta",
    "taylor",
]
