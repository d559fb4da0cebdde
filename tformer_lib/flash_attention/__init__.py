"""Flash attention: exact attention that never writes the T x S scores to memory.

Two tiles of numbers at a time are enough, because the softmax can be computed online: a running maximum m, a running
sum l and an unnormalised output O are corrected whenever a new tile of keys raises the maximum (Dao et al.,
arXiv:2205.14135; Milakov and Gimelshein, arXiv:1805.02867). The backward recomputes the probabilities from the
log-sum-exp that the forward kept, L = m + log l.

The ladder of implementations, each callable by its ``step``:

====== ============================== ============================================ ====================
step   source                         what it is                                   runs on
====== ============================== ============================================ ====================
0      reference                      tiles in plain PyTorch: the oracle           anything
"cpu"  cpu.cpp                        the same tiles in vectorised C++             a CPU, f32 bf16 f16
1      1_scalar.cu                    one warp a query, no tiles                   a GPU, f32
2      2_tiled.cu                     tiles in shared memory, no tensor cores      a GPU, f32
3      3_tensor_core.cu               mma.sync, ldmatrix, cp.async                 sm_80 on, bf16 f16
4      4_hopper.cu                    TMA, wgmma, warp specialisation              sm_90, bf16 f16
====== ============================== ============================================ ====================

The last two have rungs, steps "3a" to "3d" and "4a" to "4d": the same kernel with the ideas that the rung's file names,
and none of those that come after it.

``step=None`` takes the top one that can do what is asked. Gradients come from ``cpu.cpp`` on a CPU, from
``backward_4_hopper.cu`` and, where head_dim is over 128, ``backward_4_wide.cu`` on a Hopper GPU (step 4; bf16 and
f16), from ``backward_3_tensor_core.cu`` on any GPU from sm_80 on (step 3; bf16 and f16), from ``backward_2_tiled.cu``
in float32, and from step 0 otherwise.

Scores may be capped by tanh and biased by distance (ALiBi), windows may be open to the right, and values may have a
width of their own: steps 0, "cpu", 3 and 4 do that, the last two by files of their own where scores are more than
products. :func:`merge_states` puts attention over parts of the keys together.

Each part has a room: ``attention`` (the public door), ``plans`` (what the second call of a layout goes by), ``float8``
(a forward of its own), ``options``, ``reference`` (step 0), ``kernels`` (what they are given, and which can do what),
``operators`` (what torch sees), ``qkvpacked`` (self-attention of one tensor), ``states``.
"""

from tformer_lib.flash_attention.attention import flash_attention, flash_attention_varlen
from tformer_lib.flash_attention.float8 import flash_attention_float8, hadamard_rotation, quantize_float8
from tformer_lib.flash_attention.kernels import GRADIENTS, LADDER, RUNGS, resources
from tformer_lib.flash_attention.options import Options, Packing
from tformer_lib.flash_attention.qkvpacked import flash_attention_qkvpacked
from tformer_lib.flash_attention.reference import forward_rows, tiled_backward, tiled_forward, tiles
from tformer_lib.flash_attention.states import merge_states

__all__ = [
    "GRADIENTS",
    "LADDER",
    "Options",
    "Packing",
    "RUNGS",
    "flash_attention",
    "flash_attention_float8",
    "flash_attention_qkvpacked",
    "flash_attention_varlen",
    "forward_rows",
    "hadamard_rotation",
    "merge_states",
    "quantize_float8",
    "resources",
    "tiled_backward",
    "tiled_forward",
    "tiles",
]
