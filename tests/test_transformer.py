"""The models against torch's and transformers' own, and the properties that their mathematics promises."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tformer_lib import positional_encoding
from tformer_lib.attention import attend
from tformer_lib.mixture_of_experts import ExpertsConfig
from tformer_lib.transformer import (
    ACTIVATIONS,
    Block,
    Decoder,
    Embedding,
    EncoderDecoder,
    FeedForward,
    ModelConfig,
    attention_form,
    count_parameters,
    label_smoothed_loss,
)

WIDTH, HEADS, INNER = 32, 4, 56

LLAMA_LIKE = {"norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False, "tie_embeddings": False}
LINEAR = {"key_heads": 2, "value_heads": 4, "head_dim": 4, "value_dim": 6}
KINDS = {
    "gpt2": {"feed_forward": "gelu_tanh", "positions": "learned"},
    "llama": LLAMA_LIKE,
    "grouped": {**LLAMA_LIKE, "kv_heads": 2},
    "paper": {"feed_forward": "relu", "positions": "sinusoidal", "norm_first": False, "scale_embeddings": True},
    "alibi": {"positions": "alibi"},
    "reference": {"positions": "rope", "attention": "attention", "head_dim": 16},
    "no positions": {"positions": "none"},
    "modern": {
        **LLAMA_LIKE,
        "window": 3,
        "layer_types": ("window", "full"),
        "window_rope_base": 100.0,
        "feed_forward": "geglu",
        "norm": "rmsnorm_1p",
        "branch_norm": "both",
        "qk_norm": "head",
        "attention_sinks": True,
        "attention_gate": True,
        "logit_softcap": 5.0,
        "rotary_fraction": 0.5,
    },
}


def config(**changes) -> ModelConfig:
    return ModelConfig(**({"vocab_size": 61, "max_length": 40, "width": WIDTH, "layers": 2, "heads": HEADS} | changes))


def decoder(kind: str, **changes) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config(**(KINDS[kind] | changes))).eval()
    for p in model.parameters():  # zero biases and unit norms would hide a wrong one
        nn.init.normal_(p, mean=float(p.dim() < 2), std=0.2)
    return model


# --- torch.nn as oracle -------------------------------------------------------------------------------------------


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    for name, weight, bias in zip(
        ("q_proj", "k_proj", "v_proj"), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
    ):
        getattr(ours, name).weight.data.copy_(weight)
        getattr(ours, name).bias.data.copy_(bias)
    ours.out_proj.load_state_dict(theirs.out_proj.state_dict())


def copy_layer(ours: Block, theirs: nn.Module, *, cross: bool) -> None:
    copy_attention(ours.attention, theirs.self_attn)
    ours.attention_norm.load_state_dict(theirs.norm1.state_dict())
    if cross:
        copy_attention(ours.cross_attention, theirs.multihead_attn)
        ours.cross_norm.load_state_dict(theirs.norm2.state_dict())
    last = theirs.norm3 if cross else theirs.norm2
    ours.feed_forward_norm.load_state_dict(last.state_dict())
    ours.feed_forward.up.load_state_dict(theirs.linear1.state_dict())
    ours.feed_forward.down.load_state_dict(theirs.linear2.state_dict())


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("attention", ["attention", "sdpa"])
def test_equals_torch_transformer(norm_first, activation, attention):
    torch.manual_seed(1)
    theirs = nn.Transformer(
        WIDTH, HEADS, 2, 2, INNER, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    ).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, mean=float(p.dim() < 2), std=0.2)
    choices = config(
        feed_forward=activation,
        feed_forward_width=INNER,
        norm_first=norm_first,
        final_norm=True,
        attention=attention,
        positions="sinusoidal",
    )
    ours = EncoderDecoder(choices).eval()
    for stack, layers, cross in ((ours.encoder, theirs.encoder, False), (ours.decoder, theirs.decoder, True)):
        for block, layer in zip(stack.blocks, layers.layers, strict=True):
            copy_layer(block, layer, cross=cross)
        stack.final_norm.load_state_dict(layers.norm.state_dict())

    source, target = torch.randn(3, 9, WIDTH), torch.randn(3, 6, WIDTH)
    lengths = torch.tensor([9, 5, 1])
    padded = torch.arange(9) >= lengths[:, None]  # torch's padding mask is True where nobody may look
    expected = theirs(
        source,
        target,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(6),
        src_key_padding_mask=padded,
        memory_key_padding_mask=padded,
    )
    seen = ~padded[:, None, None, :]
    memory = ours.encoder(source, mask=seen)
    out = ours.decoder(target, memory=memory, memory_mask=seen, causal=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_feed_forward_formula(kind):
    layer = FeedForward(config(feed_forward=kind, feed_forward_width=INNER)).double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    up = x @ layer.up.weight.T + layer.up.bias
    if kind == "relu":
        hidden = up.clamp(min=0)
    elif kind == "gelu":
        hidden = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
    elif kind == "gelu_tanh":
        hidden = up * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:
        gate = x @ layer.gate.weight.T + layer.gate.bias
        hidden = gate / (1 + torch.exp(-gate)) * up
    torch.testing.assert_close(layer(x), hidden @ layer.down.weight.T + layer.down.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_compiled_gelu_is_the_same_function(dtype):
    compiled = torch.compile(ACTIVATIONS["gelu_tanh"], backend="aot_eager", fullgraph=True)
    x = torch.linspace(-12, 12, 4001, dtype=dtype, requires_grad=True)
    ours, theirs = compiled(x), nn.functional.gelu(x, approximate="tanh")
    rounding = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(ours, theirs, atol=rounding, rtol=rounding)
    for a, b in zip(*(torch.autograd.grad(y.sum(), x) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=rounding, rtol=rounding)


# --- transformers as oracle ---------------------------------------------------------------------------------------


def test_equals_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_positions=40, n_embd=WIDTH, n_layer=2, n_head=HEADS, initializer_range=0.3
        )
    ).eval()
    ours = Decoder(config(**KINDS["gpt2"])).eval()
    copy_gpt2(ours, theirs.state_dict())

    tokens = torch.randint(0, 61, (3, 17))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)

    text = tokens[:1, :5]
    expected = theirs.generate(text, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    for _ in range(20):
        text = torch.cat([text, ours(text)[:, -1:].argmax(-1)], dim=1)
    assert text.tolist() == expected.tolist()


def copy_gpt2(ours: Decoder, state: dict) -> None:
    """GPT-2's names to ours; its Conv1D stores (in, out), a Linear stores (out, in)."""
    ours.embedding.tokens.weight.data.copy_(state["transformer.wte.weight"])
    ours.embedding.places.table.weight.data.copy_(state["transformer.wpe.weight"])
    for i, block in enumerate(ours.stack.blocks):
        layer = {k.removeprefix(f"transformer.h.{i}."): v for k, v in state.items()}
        parts = zip(layer["attn.c_attn.weight"].chunk(3, dim=1), layer["attn.c_attn.bias"].chunk(3), strict=True)
        for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            copy_linear(getattr(block.attention, name), weight, bias)
        copy_linear(block.attention.out_proj, layer["attn.c_proj.weight"], layer["attn.c_proj.bias"])
        copy_linear(block.feed_forward.up, layer["mlp.c_fc.weight"], layer["mlp.c_fc.bias"])
        copy_linear(block.feed_forward.down, layer["mlp.c_proj.weight"], layer["mlp.c_proj.bias"])
        for norm, name in ((block.attention_norm, "ln_1"), (block.feed_forward_norm, "ln_2")):
            norm.load_state_dict({part: layer[f"{name}.{part}"] for part in ("weight", "bias")})
    final = {part: state[f"transformer.ln_f.{part}"] for part in ("weight", "bias")}
    ours.stack.final_norm.load_state_dict(final)


def copy_linear(ours: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    ours.weight.data.copy_(weight.T)
    ours.bias.data.copy_(bias)


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_the_future(kind):
    model = decoder(kind)
    tokens = torch.randint(0, 61, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    model = decoder(kind)
    model(torch.randint(0, 61, (2, 12))).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_padding_and_packed_neighbours(kind):
    """Two documents in one row, kept apart by a mask, with their own positions, give what each gives alone."""
    model = decoder(kind)
    a, b = torch.randint(0, 61, (1, 5)), torch.randint(0, 61, (1, 7))
    document = torch.tensor([0] * 5 + [1] * 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    packed = model(torch.cat([a, b], dim=1), mask=document[:, None] == document, positions=positions)
    torch.testing.assert_close(packed[:, :5], model(a), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "grouped"])
def test_reference_and_fused_attention_agree(kind):
    model = decoder(kind)
    slow = Decoder(model.config, attend=attend).eval()
    slow.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 61, (2, 12))
    torch.testing.assert_close(model(tokens), slow(tokens), atol=1e-4, rtol=1e-4)


def test_without_positions_order_is_invisible_to_the_last_token():
    model = decoder("no positions", layers=1)
    tokens = torch.randint(0, 61, (1, 9))
    shuffled = torch.cat([tokens[:, torch.randperm(8)], tokens[:, 8:]], dim=1)
    torch.testing.assert_close(model(shuffled)[:, -1], model(tokens)[:, -1], atol=1e-5, rtol=1e-5)
    with_positions = decoder("gpt2", layers=1)
    assert not torch.allclose(with_positions(shuffled)[:, -1], with_positions(tokens)[:, -1], atol=1e-3)


def test_encoder_decoder_ignores_padding_and_the_future():
    torch.manual_seed(3)
    model = EncoderDecoder(config(**KINDS["paper"])).eval()
    source, target = torch.randint(0, 61, (2, 8)), torch.randint(0, 61, (2, 6))
    lengths = torch.tensor([8, 5])
    before = model(source, target, source_lengths=lengths)
    source[1, 5:] = (source[1, 5:] + 1) % 61
    target[:, 4:] = (target[:, 4:] + 1) % 61
    after = model(source, target, source_lengths=lengths)
    torch.testing.assert_close(after[:, :4], before[:, :4])


@pytest.mark.parametrize("start", [1, 2])
def test_translate_is_the_argmax_step_by_step_and_stops(start):
    """The token that closes a target may open it too, as in BART: it closes what follows it alone."""
    torch.manual_seed(4)
    model = EncoderDecoder(config(**KINDS["paper"])).eval()
    source = torch.randint(3, 61, (2, 8))
    written = model.translate(source, start=start, end=2, max_length=10)
    target = torch.cat([torch.full((2, 1), start), written], dim=1)
    expected = model(source, target[:, :-1]).argmax(-1)
    assert (expected[:, 0] != 2).all(), "the model ends at once: choose another seed"
    for row, right in zip(written.tolist(), expected.tolist(), strict=True):
        stop = row.index(2) + 1 if 2 in row else len(row)
        assert row[:stop] == right[:stop]
        assert set(row[stop:]) <= {2}


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_translate_refuses_logits_that_are_no_numbers(weight):
    model = EncoderDecoder(config(**KINDS["paper"]))
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(weight)
    with pytest.raises(ValueError, match="logits of row 0 are not finite after 0 new tokens"):
        model.translate(torch.ones(2, 3, dtype=torch.int64), start=1, end=2, max_length=4)


def test_translate_puts_each_module_back_where_it_fails_too():
    model = EncoderDecoder(config(**KINDS["paper"], dropout=0.5))
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.translate(torch.full((1, 3), 99), start=1, end=2)
    model.translate(torch.ones(1, 3, dtype=torch.int64), start=1, end=2, max_length=2)
    assert [module.training for module in model.modules()] == before


def test_translate_reads_no_padding_drops_nothing_and_leaves_the_mode():
    torch.manual_seed(5)
    model = EncoderDecoder(config(**KINDS["paper"], dropout=0.5))
    short, padded = torch.randint(3, 61, (1, 5)), torch.full((2, 8), 60)
    padded[:, :5] = short
    expected = model.translate(short, start=1, end=2, max_length=10)
    written = model.translate(padded, start=1, end=2, max_length=10, source_lengths=torch.tensor([5, 5]))
    assert model.training
    assert written.tolist() == expected.tolist() * 2
    assert model.translate(short, start=1, end=2, max_length=0).shape == (1, 0)


@pytest.mark.parametrize("kind", ["gpt2", "grouped", "paper", "alibi", "modern"])
def test_models_compile_as_one_graph(kind):
    torch.manual_seed(6)
    source, target, lengths = torch.randint(3, 61, (2, 8)), torch.randint(3, 61, (2, 5)), torch.tensor([8, 3])
    if kind == "paper":
        model, inputs = EncoderDecoder(config(**KINDS[kind])).eval(), (source, target)
        run = lambda *tokens: model(*tokens, source_lengths=lengths)  # noqa: E731
    else:
        model, inputs = decoder(kind), (source,)
        run = model
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="eager")(*inputs)
        torch.testing.assert_close(compiled, run(*inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "hybrid"])
def test_gradients_of_each_text_by_one_map_over_the_batch(kind):
    """What differential privacy and influence functions ask for: ``torch.func.vmap`` of ``torch.func.grad``."""
    hybrid = {"linear": LINEAR, "layer_types": ("linear", "full")}
    model = decoder("llama", **hybrid) if kind == "hybrid" else decoder(kind)
    texts = torch.randint(61, (3, 9))

    def loss(parameters, text):
        logits = torch.func.functional_call(model, parameters, (text[None, :-1],))
        return nn.functional.cross_entropy(logits[0], text[1:])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), texts)
    for i, text in enumerate(texts):
        model.zero_grad()
        nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad, atol=1e-4, rtol=1e-4)


OTHER_KINDS = {
    "hybrid": {**LLAMA_LIKE, "linear": LINEAR, "layer_types": ("linear", "full")},
    "experts": {**LLAMA_LIKE, "experts": ExpertsConfig(count=4, per_token=2, width=16)},
    "narrow residual": {**LLAMA_LIKE, "positions": "learned"},
}


@pytest.mark.parametrize("kind", [*KINDS, *OTHER_KINDS])
def test_autocast_leaves_float64_alone_as_torch_does(kind):
    """Each part that chooses a type for its products chooses the one that torch's own take."""
    torch.manual_seed(3)
    model, text = Decoder(config(**(KINDS | OTHER_KINDS)[kind])).double(), torch.randint(61, (2, 9))
    model.stack.residual_in_fp32 = kind != "narrow residual"
    expected = model(text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(text), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, *OTHER_KINDS])
def test_models_are_built_and_run_without_any_memory(kind):
    """Under a FakeTensorMode, and on the meta device: shapes alone."""
    options = (KINDS | OTHER_KINDS)[kind]
    with FakeTensorMode():
        assert Decoder(config(**options))(torch.randint(61, (2, 9))).shape == (2, 9, 61)
    with torch.device("meta"):
        model = Decoder(config(**options))
    assert model(torch.zeros(2, 9, dtype=torch.int64, device="meta")).shape == (2, 9, 61)


def test_the_logits_of_some_places_are_those_of_all():
    model = decoder("llama").double()
    tokens = torch.randint(61, (2, 9))
    some = torch.tensor([8, 0, 3, 3])
    torch.testing.assert_close(model(tokens, only=some), model(tokens)[:, some], rtol=0, atol=1e-12)


def test_tied_tables_are_one_and_counted_once():
    tied, loose = decoder("gpt2"), decoder("gpt2", tie_embeddings=False)
    assert tied.unembedding.weight is tied.embedding.tokens.weight
    assert count_parameters(loose) - count_parameters(tied) == 61 * WIDTH
    paper = EncoderDecoder(config(**KINDS["paper"]))
    assert paper.unembedding.weight is paper.embedding.tokens.weight


def test_gpt2_small_has_124_million_parameters():
    with torch.device("meta"):
        block = Block(config(width=768, heads=12, **KINDS["gpt2"]))
        embedding = Embedding(ModelConfig(vocab_size=50257, max_length=1024, width=768, heads=12))
    final_norm = 2 * 768
    assert 12 * count_parameters(block) + count_parameters(embedding) + final_norm == 124_439_808


def test_embeddings_are_scaled_as_in_the_paper():
    embedding = Embedding(config(**KINDS["paper"]))
    tokens = torch.tensor([[3, 5, 3]])
    expected = embedding.tokens(tokens) * math.sqrt(WIDTH) + positional_encoding.sinusoidal(3, WIDTH)
    torch.testing.assert_close(embedding(tokens), expected)


def test_residual_branches_start_small():
    """After initialisation what the blocks add to a unit residual is small, whatever the depth."""
    torch.manual_seed(5)
    x = torch.randn(4, 16, 128)
    models = [Decoder(config(width=128, layers=n, final_norm=False)) for n in (2, 16)]
    added = [(model.stack(x) - x).std().item() for model in models]
    assert all(a < 0.3 for a in added), added
    assert added[1] < 1.5 * added[0], added


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_formula(smoothing):
    logits, targets = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    targets[0, 0] = -100
    log_p = logits.double().log_softmax(-1)
    wanted = torch.full_like(log_p, smoothing / 7)
    wanted.scatter_add_(-1, targets.clamp(min=0)[..., None], torch.full((2, 5, 1), 1 - smoothing, dtype=torch.float64))
    expected = -(wanted * log_p).sum(-1)[targets != -100].mean()
    torch.testing.assert_close(label_smoothed_loss(logits, targets, smoothing=smoothing).double(), expected)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "width 30 is not a multiple of heads, 4"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"norm": "batchnorm"}, "norm must be one of layernorm, rmsnorm, rmsnorm_1p, got 'batchnorm'"),
        ({"positions": "rotary"}, "positions must be one of"),
        ({"attention": "magic"}, "attention must be one of"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"positions": "rope", "head_dim": 7}, "head_dim must be even, got 7"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"feed_forward_width": 0}, "feed_forward_width must be at least 1, got 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be finite in float32 and at least 0, got nan"),
        ({"norm_epsilon": 1e39}, "norm_epsilon must be finite in float32 and at least 0, got 1e"),
        ({"positions": "rope", "rope_base": 0.0}, "base must be positive, got 0"),
        ({"positions": "rope", "rope_layout": "neox"}, "layout must be one of half, interleaved, got 'neox'"),
        ({"positions": "rope", "rope_scaling": {"rope_type": "linear"}}, "linear scaling needs factor"),
        ({"layer_types": ("linear", "full")}, "layer_types and linear go together"),
        (
            {"layer_types": ("linear",), "linear": {"key_heads": 2, "value_heads": 3, "head_dim": 4, "value_dim": 4}},
            "got 3 and 2",
        ),
        ({"linear": LINEAR}, "layer_types and linear go together"),
        ({"branch_norm": "after"}, "branch_norm must be one of in, out, both, got 'after'"),
        ({"branch_norm": "out", "norm_first": False}, "needs norm_first"),
        ({"qk_norm": "token"}, "qk_norm must be one of None, head, projection, got 'token'"),
        ({"attention_bias": "q"}, "attention_bias must be one of"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"layer_types": ("window", "full")}, "layer_types and window go together, got window None"),
        ({"layer_types": ("full",), "window": 4}, "layer_types and window go together, got window 4"),
        ({"layer_types": ()}, "layer_types must name at least 1 layer and at most 2, got 0"),
        ({"layer_types": ("full", "local")}, "layer_types must be of full, window, nope, linear, got 'local'"),
        ({"attention_softcap": 0.0}, "attention_softcap must be positive and finite in float32, got 0"),
        ({"logit_softcap": float("nan")}, "logit_softcap must be positive and finite in float32, got nan"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\), got 1"),
        ({"rotary_fraction": 0.0}, r"rotary_fraction must be in \(0, 1\], got 0"),
        ({"positions": "rope", "rotary_fraction": 0.4}, "rotary_dim"),
    ],
)
def test_config_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_models_refuse_bad_input_by_name():
    model = decoder("gpt2")
    with pytest.raises(ValueError, match=r"tokens must be \(batch, T\) integers, got torch.float32 of shape \(2, 3\)"):
        model(torch.randn(2, 3))
    with pytest.raises(ValueError, match="40"):
        model(torch.zeros(1, 41, dtype=torch.int64))
    for token in (-1, 61):
        with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary, which has tokens 0 to 60"):
            model(torch.tensor([[3, token, 5]]))
    with pytest.raises(ValueError, match=r"tokens must be a tensor .* got list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match="has a cross-attention and so takes a memory, got none"):
        Block(config(), cross=True)(torch.zeros(1, 3, config().width))
    with pytest.raises(ValueError, match="has no cross-attention and so takes no memory, got one"):
        Block(config())(torch.zeros(1, 3, config().width), memory=torch.zeros(1, 3, config().width))
    with pytest.raises(ValueError, match="encoder-decoder"):
        EncoderDecoder(config(positions="rope"))
    with pytest.raises(ValueError, match="attention must be one of"):
        attention_form("magic")
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\], got -0.1"):
        label_smoothed_loss(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), smoothing=-0.1)
