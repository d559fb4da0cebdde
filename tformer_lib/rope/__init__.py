"""RoPE: queries and keys are turned by angles that grow with their position (Su et al. 2021, RoFormer).

Channels form pairs; pair i of a token at position p turns by p * theta_i, theta_i = base^(-2i / rotary_dim).
A dot product of two turned vectors then depends on the distance of their positions alone.

    rope = Rope(head_dim=64, layout="half")
    rotate_at = rope.at(positions)             # positions: (T,) or (batch, T)
    q, k = rotate_at(q), rotate_at(k)          # (batch, heads, T, head_dim)
    q, k = rotate_at.both(q, k)                # the same in one pass

Two layouts of the pairs are in use, and nothing fails when they are mixed up, except the model:
"interleaved" pairs channels (0, 1), (2, 3), ... as the paper and Meta's Llama files do; "half" pairs channel i
with channel i + rotary_dim / 2, as GPT-NeoX and transformers do. `convert_layout` takes weights from one to the other.

====== ==================== ========================================== ==========================
step   source               what it is                                 runs on
====== ==================== ========================================== ==========================
0      pairs.py             plain PyTorch: the oracle                  anything
1      1_pairs.cu           one lane a pair                            a GPU, f32 bf16 f16
2      2_vectors.cu         16-byte loads, angles kept in registers    a GPU, f32 bf16 f16, aligned
====== ==================== ========================================== ==========================

On a GPU the top step that can do what is asked is taken; on a CPU step 0.
"""

from tformer_lib.rope.kernels import rotate, rotate_at_positions, rotate_both, rotate_both_
from tformer_lib.rope.pairs import (
    LAYOUTS,
    check_layout,
    check_rotary_dim,
    check_rotation,
    convert_layout,
    join_pairs,
    split_pairs,
    turn_pairs,
)
from tformer_lib.rope.rope import Rope, Rotation, turn_both
from tformer_lib.rope.scaling import (
    NTK,
    SCALINGS,
    DynamicNTK,
    Linear,
    Llama3,
    LongRope,
    Proportional,
    Scaling,
    Yarn,
    frequency_powers,
    plain_frequencies,
    scaling_from,
)

__all__ = [
    "LAYOUTS",
    "NTK",
    "SCALINGS",
    "DynamicNTK",
    "Linear",
    "Llama3",
    "LongRope",
    "Proportional",
    "Rope",
    "Rotation",
    "Scaling",
    "Yarn",
    "check_layout",
    "check_rotary_dim",
    "check_rotation",
    "convert_layout",
    "frequency_powers",
    "join_pairs",
    "plain_frequencies",
    "rotate",
    "rotate_at_positions",
    "rotate_both",
    "rotate_both_",
    "scaling_from",
    "split_pairs",
    "turn_both",
    "turn_pairs",
]
