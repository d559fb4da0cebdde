"""What a family of checkpoints is: how its config is read and written, and where each of our parameters is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from tformer_lib.pretrained.keys import Keys
from tformer_lib.pretrained.links import Link, same
from tformer_lib.transformer import ModelConfig

Special = Callable[[str, str, ModelConfig], Link | None]
"""A link for a parameter that is no plain tensor of the file: its name in the block, where the block's tensors are."""


BLOCK = "stack.blocks."


LLAMA_NAMES = {
    "embedding.tokens": "model.embed_tokens",
    "stack.final_norm": "model.norm",
    "unembedding": "lm_head",
    "attention": "self_attn",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.out_proj": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
"""Our modules and those of Llama's files; what stands in a block is counted from ``model.layers.N``."""


OUT_NORM_NAMES = {
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}
"""The norms of models that normalise what sub-layers give (Gemma, OLMo 2)."""


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        read: a config's keys to our config.
        write: our config to the keys of a ``config.json`` that ``read`` reads back.
        names: our module -> theirs.
        layers: where their blocks are.
        special: what makes a link for a parameter that no single tensor of the file holds.
        forgotten: ends of names that old files hold and that nothing is made of.
        prefix: what may stand before each name.
        elsewhere: beginnings of names of parts that are no language model.
        experts, latent, linear: whether the family's models have them.
    """

    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict]
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    layers: str = "model.layers."
    special: Special = lambda name, place, config: None
    forgotten: tuple[str, ...] = (".rotary_emb.inv_freq",)
    prefix: str = ""
    elsewhere: tuple[str, ...] = ()
    experts: bool = False
    latent: bool = False
    linear: bool = False

    def links(self, model: nn.Module) -> Iterator[Link]:
        """The links of all of a ``Decoder``'s parameters."""
        linked: set[str] = set()
        for name, parameter in model.named_parameters():
            if name in linked:
                continue
            link = self.link(name, parameter, model.config)
            linked |= set(link.ours)
            yield link

    def link(self, name: str, parameter: Tensor, config: ModelConfig) -> Link:
        """The link that holds a parameter.

        Raises:
            ValueError: this family's files have no such parameter.
        """
        begin, inside, place = "", name, ""
        if name.startswith(BLOCK):
            number, inside = name.removeprefix(BLOCK).split(".", 1)
            begin, place = f"{BLOCK}{number}.", f"{self.layers}{number}."
        special = self.special(inside, place, config)
        if special is not None:
            return Link(tuple(begin + ours for ours in special.ours), special.theirs, special.read, special.write)
        module, _, leaf = inside.rpartition(".")
        if module not in self.names:
            raise ValueError(f"files of this family have no place for {name}")
        return same(name, f"{place}{self.names[module]}.{leaf}")
