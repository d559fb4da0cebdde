"""The gated delta rule as a layer: equal to that of published models, in one pass or in any pieces."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tformer_lib import linear_attention as la
from tformer_lib.attention import MultiHeadAttention
from tformer_lib.linear_attention.layer import convolved

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 24
SIZES = {"key_heads": 2, "value_heads": 4, "head_dim": 8, "value_dim": 12}


def make(dtype=torch.float64, seed=0, **sizes):
    torch.manual_seed(seed)
    return la.GatedDeltaLayer(WIDTH, **(SIZES | sizes)).to(dtype)


def by_steps(layer, x):
    """The layer as its docstring writes it, token by token, for one text x (T, width)."""
    d, e, H = layer.head_dim, layer.value_dim, layer.value_heads
    memory, outputs = x.new_zeros(H, d, e), []
    channels = F.pad(layer.qkv_proj(x), (0, 0, layer.kernel - 1, 0))  # zeros before the first token
    for t in range(x.shape[0]):
        qkv = F.silu((channels[t : t + layer.kernel] * layer.convolution.T).sum(0))
        q, k, v = qkv.split([layer.key_width, layer.key_width, layer.value_width])
        q, k = (F.normalize(y.view(-1, d), dim=1).repeat_interleave(H // layer.key_heads, 0) for y in (q, k))
        beta = layer.beta_proj(x[t]).sigmoid()[:, None]
        kept = (-layer.log_rate.exp() * F.softplus(layer.decay_proj(x[t]) + layer.decay_bias)).exp()
        memory = kept[:, None, None] * memory
        wrong = v.view(H, e) - torch.einsum("hd,hde->he", k, memory)
        memory = memory + torch.einsum("hd,he->hde", k, beta * wrong)
        o = torch.einsum("hd,hde->he", q, memory) * d**-0.5
        o = F.rms_norm(o, (e,), layer.norm, layer.norm_epsilon) * F.silu(layer.gate_proj(x[t]).view(H, e))
        outputs.append(layer.out_proj(o.flatten()))
    return torch.stack(outputs)


@pytest.mark.parametrize("sizes", [{}, {"kernel": 1}, {"value_heads": 2, "value_dim": 8}], ids=str)
@pytest.mark.parametrize("T", [1, 3, 70])
def test_the_layer_is_its_formula(T, sizes):
    layer, x = make(**sizes), torch.randn(2, T, WIDTH, dtype=torch.float64)
    truth = torch.stack([by_steps(layer, text) for text in x])
    torch.testing.assert_close(layer(x), truth, atol=1e-5, rtol=1e-5)  # the layer's epsilon is not F.normalize's


@pytest.mark.parametrize("pieces", [(70,), (1,) * 70, (65, 1, 1, 3), (2, 0, 68)], ids=lambda p: f"{len(p)} pieces")
def test_a_layer_fed_in_pieces_equals_one_pass(pieces):
    layer, x, state = make(), torch.randn(2, 70, WIDTH, dtype=torch.float64), la.LayerState()
    outs = [layer(part, state=state) for part in x.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), atol=1e-12, rtol=1e-10)
    assert state.channels.shape == (2, layer.channels, 3)
    assert state.memory.shape == (2, 4, 8, 12)
    assert state.nbytes == (2 * layer.channels * 3 + 2 * 4 * 8 * 12) * 8


def test_padding_before_a_text_changes_neither_its_outputs_nor_its_state():
    layer, x = make(), torch.randn(2, 40, WIDTH, dtype=torch.float64)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :13] = False
    padded, alone = la.LayerState(), la.LayerState()
    out = layer(x, state=padded, mask=mask)
    torch.testing.assert_close(out[0, 13:], layer(x[:1, 13:], state=alone)[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(padded.memory[:1], alone.memory)
    torch.testing.assert_close(padded.channels[:1], alone.channels)


def test_a_state_follows_its_rows_and_forgets():
    layer, x = make(), torch.randn(3, 9, WIDTH, dtype=torch.float64)
    state = la.LayerState()
    layer(x, state=state)
    state.reorder([2, 0, 0, 1])
    token = torch.randn(4, 1, WIDTH, dtype=torch.float64)
    whole = torch.cat([x[[2, 0, 0, 1]], token], 1)
    torch.testing.assert_close(layer(token, state=state), layer(whole)[:, -1:], atol=1e-12, rtol=1e-10)
    state.reset()
    torch.testing.assert_close(layer(x, state=state), layer(x))


def test_a_changed_future_token_changes_no_earlier_output():
    layer, x = make(), torch.randn(1, 70, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[:, 50:] += 1
    torch.testing.assert_close(layer(changed)[:, :50], layer(x)[:, :50], atol=0, rtol=0)


def test_gradients_reach_every_weight():
    layer, x = make(), torch.randn(1, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    names, weights = zip(*layer.named_parameters(), strict=True)
    form = lambda *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x.detach(),))  # noqa: E731
    assert torch.autograd.gradcheck(form, weights, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_in_less_precision(dtype):
    layer, x = make(), torch.randn(1, 70, WIDTH, dtype=torch.float64)
    truth = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - truth).norm() / truth.norm() < 4 * torch.finfo(dtype).eps


def published(family):
    """(transformers' layer with random weights, its config, our layer) of a family."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    sizes = {"hidden_size": WIDTH, "linear_conv_kernel_dim": 4, "num_hidden_layers": 1}
    sizes |= {"layer_types": ["linear_attention"]}
    if family == "qwen3_next":
        from transformers import Qwen3NextConfig as Config
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet as Theirs

        sizes |= heads | {"linear_value_head_dim": 12}
    elif family == "qwen3_5":
        from transformers import Qwen3_5TextConfig as Config
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet as Theirs

        sizes |= heads | {"linear_value_head_dim": 12}
    else:
        from transformers import KimiLinearConfig as Config
        from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention as Theirs

        sizes |= {"linear_num_heads": 2, "linear_head_dim": 8}
    config = Config(**sizes)
    torch.manual_seed(1)
    theirs = Theirs(config, 0)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.5)
    if family == "kimi_linear":
        ours = la.KimiDeltaLayer(WIDTH, heads=2, head_dim=8, norm_epsilon=config.rms_norm_eps)
    else:
        ours = make(torch.float32, norm_epsilon=config.rms_norm_eps)
    ours.load_state_dict(la.weights_from_checkpoint(ours, theirs.state_dict()))
    return theirs, config, ours


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "kimi_linear"])
def test_the_layers_of_published_models_give_the_same(family):
    """In one pass, and in a prompt followed by tokens from its state."""
    from transformers import DynamicCache

    theirs, config, ours = published(family)
    x, cache, state = torch.randn(2, 75, WIDTH), DynamicCache(config=config), la.LayerState()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
        for part in x.split([70, 1, 1, 3], 1):
            torch.testing.assert_close(ours(part, state=state), theirs(part, cache), atol=1e-4, rtol=1e-4)


def test_a_layer_with_a_decay_a_feature_streams_and_hides_padding():
    torch.manual_seed(0)
    layer, state = la.KimiDeltaLayer(WIDTH, heads=2, head_dim=8).double(), la.LayerState()
    x, mask = torch.randn(2, 40, WIDTH, dtype=torch.float64), torch.ones(2, 40, dtype=torch.bool)
    mask[0, :13] = False
    outs = [layer(part, state=state, mask=seen) for part, seen in zip(x.split(20, 1), mask.split(20, 1), strict=True)]
    torch.testing.assert_close(torch.cat(outs, 1)[0, 13:], layer(x[:1, 13:])[0], atol=1e-12, rtol=1e-10)


def test_weights_of_another_layer_are_refused():
    with pytest.raises(ValueError, match=r"not of a gated delta layer: q_proj\.weight"):
        la.weights_from_checkpoint(make(), {"q_proj.weight": torch.zeros(2, 2)})


class Hybrid(nn.Module):
    """A small model whose token mixers are three gated delta layers and one softmax attention."""

    def __init__(self, symbols, width=32):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        linear = [la.GatedDeltaLayer(width, key_heads=2, value_heads=2, head_dim=16) for _ in range(3)]
        self.mixers = nn.ModuleList([*linear, MultiHeadAttention(width, 2)])
        self.forwards = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(4)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(5))
        self.unembedding = nn.Linear(width, symbols)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for norm, mixer, forward in zip(self.norms, self.mixers, self.forwards, strict=False):
            options = {"causal": True} if isinstance(mixer, MultiHeadAttention) else {}
            x = x + mixer(norm(x), **options)
            x = x + forward(x)
        return self.unembedding(self.norms[-1](x))


def test_a_hybrid_of_three_to_one_learns_to_recall():
    """Pairs of a key and a value, then the same pairs in another order: chance is 1 of 8 values."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    uniform = lambda *shape: torch.rand(shape, generator=generator)  # noqa: E731

    def draw(batch, pairs=4):
        keys = uniform(batch, 8).argsort(1)[:, :pairs]
        stored = torch.stack([keys, torch.randint(8, 16, (batch, pairs), generator=generator)], 2)  # (batch, pairs, 2)
        again = stored.gather(1, uniform(batch, pairs).argsort(1)[..., None].expand(-1, -1, 2))
        return torch.cat([stored, again], 1).flatten(1), again[..., 1]

    def recalled(tokens):
        return model(tokens)[:, tokens.shape[1] // 2 :: 2]  # what follows each key that comes again

    model = Hybrid(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        tokens, wanted = draw(24)
        loss = F.cross_entropy(recalled(tokens).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, wanted = draw(500)
    right = (recalled(tokens).argmax(2) == wanted).float().mean().item()
    assert right > 0.85, f"{right:.0%} of the values recalled"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(value_heads=3), "value heads must be a multiple of key heads, got 3 and 2"),
        (lambda: make(kernel=0), "kernel must be at least 1, got 0"),
        (lambda: make()(torch.zeros(2, 3, 5)), r"x must be \(batch, T, 24\), got \(2, 3, 5\)"),
        (
            lambda: make()(torch.zeros(2, 3, WIDTH).double(), mask=torch.ones(2, 4, dtype=torch.bool)),
            r"mask must be \(batch, T\) = \(2, 3\) of torch.bool, got \(2, 4\)",
        ),
    ],
)
def test_wrong_sizes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_state_of_another_batch_is_refused():
    layer, state = make(), la.LayerState()
    layer(torch.randn(2, 5, WIDTH, dtype=torch.float64), state=state)
    with pytest.raises(ValueError, match="the state is of 2 texts, x has 3"):
        layer(torch.randn(3, 1, WIDTH, dtype=torch.float64), state=state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [4, 5])
def test_one_token_is_convolved_as_many_are_and_rounded_once(n, dtype):
    x, weight = torch.randn(2, 300, n, dtype=dtype), torch.randn(300, 4, dtype=dtype)
    exact = torch.stack([(x[:, :, i : i + 4].double() * weight.double()).sum(2) for i in range(n - 3)], 2)
    found = convolved(x, weight)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-6)
