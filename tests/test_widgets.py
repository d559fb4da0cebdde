"""The data that Python puts into the interactive figures."""

import pytest
import torch

from tests.checkpoints import FAMILIES, save_chat_model
from tformer_lib import pretrained, teaching
from tformer_lib.attention import attend
from tformer_lib.distributed import costs
from tformer_lib.generation import generate
from tformer_lib.kv_cache import CacheShape
from tformer_lib.teaching import STORY
from tformer_lib.teaching.widgets import (
    attention,
    generation,
    grouped_query_attention,
    mixture_of_experts,
    real_models,
    scaling_out,
    training,
    transformer,
)
from tformer_lib.transformer import Decoder, ModelConfig, count_parameters


def test_attention_explorer_shows_the_weights_of_the_pass_that_the_model_makes():
    model, encoding = pretrained.load()
    tokens = [encoding.eot_token, *encoding.encode_ordinary(STORY)]
    forms = [block.attention.attend for block in model.stack.blocks]
    weights, chances = training.read(model, tokens)
    T = len(tokens)
    assert weights.shape == (4, 8, T, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 8, T))
    assert not weights.triu(1).any(), "the future leaks"
    with torch.no_grad():
        torch.testing.assert_close(chances, model(torch.tensor([tokens]))[0].softmax(-1), atol=1e-5, rtol=1e-4)
    assert [block.attention.attend for block in model.stack.blocks] == forms


def test_attention_explorer_packs_what_the_page_unpacks():
    model, encoding = pretrained.load()
    data = training.attention_explorer(model, encoding).data
    T = len(data["tokens"])
    assert len(data["next"]) == T
    assert "".join(data["tokens"][1:]) == STORY
    for layer in data["weights"]:
        for head in layer:
            values = [int(head[i : i + 2], 16) for i in range(0, len(head), 2)]
            assert len(values) == T * (T + 1) // 2
            last_row = values[-T:]
            assert abs(sum(last_row) - 255) <= T / 2, "each number is rounded by half a step at most"


def test_memory_calculator_counts_what_a_cache_takes():
    for model in grouped_query_attention.MODELS:
        facts = grouped_query_attention.facts(model)
        assert model.kv_heads in [kv for kv, *_ in facts["choices"]]
        if model.latent:
            assert facts["choices"] == [[1, model.layers * 576, model.parameters]]
            continue
        for kv_heads, numbers, _ in facts["choices"]:
            shape = CacheShape(model.layers, 1, kv_heads, model.head_dim, torch.bfloat16)
            assert 2 * numbers == shape.bytes_per_token


def test_memory_calculator_changes_the_parameters_with_the_kv_heads():
    size = {"vocab_size": 50, "max_length": 16, "width": 32, "layers": 3, "heads": 8, "head_dim": 4, "bias": False}
    counted = {kv: count_parameters(Decoder(ModelConfig(**size, kv_heads=kv, positions="rope"))) for kv in (1, 2, 8)}
    model = grouped_query_attention.Model("small", counted[2], 3, 32, 8, 2, 4)
    said = {kv: parameters for kv, _, parameters in grouped_query_attention.facts(model)["choices"]}
    assert {kv: said[kv] for kv in counted} == counted


def test_the_stories_model_is_counted_right():
    model, _ = pretrained.load()
    listed = next(m for m in grouped_query_attention.MODELS if m.name == "the stories model")
    assert abs(count_parameters(model) / listed.parameters - 1) < 0.01
    assert (listed.layers, listed.heads, listed.head_dim) == (4, 8, 32)


def test_lookup_hands_the_page_what_attention_is_made_of():
    W_q, W_k, W_v = torch.randn(3, 5, 2)
    x = torch.randn(4, 5)
    (story,) = attention.lookup({"one": ("abcd", x)}, W_q, W_k, W_v).data["stories"]
    q, k, v = (torch.tensor(rows)[None, None] for rows in (story["q"], story["k"], story["values"]["v"]))
    expected = ((x @ W_q) @ (x @ W_k).T).softmax(-1) @ (x @ W_v)
    torch.testing.assert_close(attend(q, k, v, scale=1.0)[0, 0], expected, atol=1e-4, rtol=1e-4)
    assert story["values"]["k"] == story["k"]
    torch.testing.assert_close(torch.tensor(story["values"]["x"]), x, atol=1e-5, rtol=0)


def test_lookup_refuses_what_does_not_fit():
    W = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="3 tokens and 4 vectors"):
        attention.lookup({"one": ("abc", torch.zeros(4, 5))}, W, W, W)
    with pytest.raises(ValueError, match="W_k takes vectors of 6 numbers"):
        attention.lookup({"one": ("abc", torch.zeros(3, 5))}, W, torch.zeros(6, 2), W)


def test_the_sampler_hands_the_page_the_model_s_distribution():
    model, encoding = pretrained.load()
    (place,) = generation.sampler(model, encoding, {"said": STORY.removesuffix(" Lily.")}).data["places"]
    tokens = [encoding.eot_token, *encoding.encode_ordinary(STORY.removesuffix(" Lily."))]
    with torch.no_grad():
        p = model(torch.tensor([tokens]))[0, -1].softmax(-1)
    said = (torch.tensor(place["logs"]) / 100).exp()
    torch.testing.assert_close(said, p.sort(descending=True).values, atol=0.006, rtol=0.01)
    assert place["words"][0] == " Lily"
    assert len(place["words"]) == generation.SHOWN


def test_the_planner_hands_the_page_what_the_formulas_say():
    config = ModelConfig(vocab_size=32_000, width=512, layers=4, heads=8)
    machine = costs.Machine(memory=2e9)
    data = scaling_out.planner({"small": config}, {"fast": machine}, windows=64, context=1024).data
    assert (data["models"], data["links"]) == (["small"], ["fast"])
    counts = costs.Counts.of(config, 64, 1024)
    for size, row in zip(data["devices"], data["plans"][0][0], strict=True):
        for name, plan in zip(data["schemes"], row, strict=True):
            found = costs.that_fits(scaling_out.SCHEMES[name], counts, machine, size)
            if found is None:
                assert plan[7] == 0
                continue
            cost, pieces = found
            assert plan[7] == pieces
            assert sum(plan[:4]) == pytest.approx(cost.held / 1e9, rel=0.02)
            assert plan[4] + plan[5] == pytest.approx(cost.seconds, rel=0.02)


def test_routing_hands_the_page_the_logits_of_the_tokens():
    logits = torch.randn(3, 5)
    data = mixture_of_experts.routing([" Lily", "\n", "."], logits).data
    assert data["tokens"] == [" Lily", "¶", "."]
    torch.testing.assert_close(torch.tensor(data["logits"]), logits, atol=0.006, rtol=0)
    with pytest.raises(ValueError, match="2 tokens and 3 rows of logits"):
        mixture_of_experts.routing(["a", "b"], logits)


def test_residual_stream_adds_up_to_what_the_model_says():
    model, encoding = pretrained.load()
    ids = torch.tensor([encoding.encode_ordinary(STORY)])
    added = transformer.additions(model, ids)
    assert len(added) == 1 + len(transformer.branches(model)) == 9
    with torch.no_grad():
        said = model(ids)[0].softmax(-1)
    torch.testing.assert_close(transformer.lens(model, added.sum(0)), said, atol=1e-5, rtol=1e-4)
    with transformer.silent(model.stack.blocks[0].attention), torch.no_grad():
        assert (model(ids)[0].softmax(-1) - said).abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0].softmax(-1), said)


def test_residual_stream_hands_the_page_the_numbers_of_the_chapter():
    model, encoding = pretrained.load()
    data = transformer.residual_stream(model, encoding).data
    said, lily, itself = data["start"], data["words"].index(" Lily"), data["words"].index(" said")
    assert data["tokens"][said] == " said"
    assert len(data["says"]) == len(data["parts"]) == len(data["lengths"]) == 9
    first = {name: says[said][:2] for name, says in zip(data["parts"], data["says"], strict=True)}
    assert first["embedding"][0] == first["attention 0"][0] == itself, "it names itself before a head has looked"
    assert first["attention 1"] == [lily, pytest.approx(970, abs=10)]
    without = dict(zip(data["parts"][1:], (says[said] for says in data["without"]), strict=True))
    assert without["attention 1"][0] != lily or without["attention 1"][1] < 100
    assert without["attention 2"][:2] == [lily, pytest.approx(1000, abs=10)]


# --- the chat of chapter 14, as the browser drives it -----------------------------------------------------------------


def press(box, what: str, **more) -> dict:
    """Send a message as the browser does, wait for the answer, and return what is shown then."""
    box._handle_custom_msg({"do": what, **more}, [])
    box.wait()
    return box.data


def test_chat_goes_on_with_a_story_by_the_shipped_model():
    box = teaching.chat(say="Once, Lily lived", max_new_tokens=12, look=(1, 4))
    model, encoding = pretrained.load()
    prompt = [encoding.eot_token, *encoding.encode_ordinary("Once, Lily lived")]
    (tokens,) = generate(model, [prompt], max_new_tokens=12)
    (turn,) = box.data["turns"]
    assert (turn["said"], turn["answer"]) == ("Once, Lily lived", encoding.decode(tokens))
    assert turn["took"].startswith(f"{len(prompt)} tokens read, 12 written, ")
    assert turn["took"].endswith(" tokens a second")
    assert not box.data["busy"]
    assert repr(box) == "Interactive figure: Chat: a model that answers from this kernel"
    shown = press(box, "say", text="")
    assert len(shown["turns"]) == 2
    assert shown["turns"][1]["took"].startswith("1 token read, 12 written")


def test_chat_answers_anew_at_another_temperature_and_begins_anew():
    box = teaching.chat(say="Once, Lily lived", max_new_tokens=12)
    greedy = box.data["turns"][0]["answer"]
    assert press(box, "again")["turns"][0]["answer"] == greedy
    press(box, "set", temperature=1.5)
    drawn = {press(box, "again")["turns"][0]["answer"] for _ in range(3)}
    assert len(drawn) == 3
    assert len(box.data["turns"]) == 1
    assert press(box, "new")["turns"] == []
    assert press(box, "again")["note"] == "nothing was said yet"
    assert "its context is 256" in press(box, "say", text="Once " * 300)["note"]
    assert box.data["turns"] == [], "a turn that is refused changes nothing"


def test_chat_stops_when_it_is_asked_to(monkeypatch):
    box, shown = teaching.chat(max_new_tokens=200), []
    box.observe(lambda change: shown.append(change.new), "data")
    monkeypatch.setattr(real_models, "PAUSE", 0.0)

    def stop_after_three(change):
        if change.new["busy"] and len(change.new["turns"][0]["answer"].split()) >= 3:
            box.hear({"do": "say", "text": "a turn that comes too soon"})
            box.hear({"do": "stop"})

    box.observe(stop_after_three, "data")
    data = press(box, "say", text="Once, Lily lived")
    assert len(data["turns"]) == 1
    assert 3 <= len(data["turns"][0]["answer"].split()) < 20
    assert [state["busy"] for state in shown][-2:] == [True, False]
    box.unobserve_all()
    assert len(press(box, "say", text="Then")["turns"]) == 2, "it goes on from there"


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_shows_the_attention_of_the_chosen_head(family, tmp_path):
    save_chat_model(tmp_path, family)
    model, encoding = pretrained.load(tmp_path, dtype=torch.float64)
    box = teaching.chat(model, encoding, say="Once upon a time there was a dog", max_new_tokens=9)
    layers = {layer for layer, _ in box.heads}
    assert layers == ({1} if family == "linear" else {0, 1}), "a linear layer has no weights to show"
    tokens = box.conversation.turns[-1].tokens
    for layer in layers:
        look = press(box, "look", place=[layer, 3])["look"]
        assert "".join(look["words"]) == encoding.decode(tokens)
        assert look["start"] + len(look["rows"]) == len(tokens)
        wanted = weights_by_hand(model, tokens, layer, 3)
        for i, row in enumerate(look["rows"]):
            torch.testing.assert_close(
                torch.tensor(row, dtype=torch.float64), wanted[look["start"] + i, : len(row)], atol=6e-4, rtol=0
            )
            assert len(row) == look["start"] + i + 1
    assert type(model.stack.blocks[1].attention).form is not None
    assert "form" not in vars(model.stack.blocks[1].attention)


def weights_by_hand(model, tokens, layer, head):
    """The softmax of the scores of one head, from the queries and keys that a pass makes: (T, T)."""
    kept = {}
    attention = model.stack.blocks[layer].attention

    def attend(q, k, v, **_):
        kept["q"], kept["k"] = q, k
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    attention.form = lambda bias=None: attend
    try:
        with torch.no_grad():
            model(torch.tensor([tokens]))
    finally:
        del attention.form
    variant, q = attention.variant, kept["q"][0, head]
    scale = variant.scale if variant and variant.scale else q.shape[-1] ** -0.5
    scores = scale * q @ kept["k"][0, head // (attention.heads // attention.kv_heads)].T
    back = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
    window = variant.window if variant and variant.window else len(tokens)
    return scores.masked_fill((back < 0) | (back >= window), float("-inf")).softmax(-1)


def test_chat_refuses_what_it_cannot_show():
    model, encoding = pretrained.load()
    with pytest.raises(ValueError, match="needs its encoding"):
        teaching.chat(model)
    with pytest.raises(ValueError, match="no head 9 with attention weights in layer 1"):
        teaching.chat(model, encoding, look=(1, 9))
    with pytest.raises(ValueError, match="there is no pretrained model 'nothing'"):
        teaching.chat("nothing")


def test_chat_says_what_went_wrong_in_its_thread(monkeypatch):
    box = teaching.chat()

    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(box.conversation.model, "forward", fail)
    assert press(box, "say", text="Once")["note"] == "RuntimeError: out of luck"
    monkeypatch.undo()
    assert press(box, "again")["note"] == ""
    assert box.data["turns"][0]["answer"]
