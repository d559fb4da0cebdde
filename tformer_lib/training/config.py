"""The settings of a run: one dataclass that says everything about it, and the presets."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from tformer_lib.checkpoint import build
from tformer_lib.command_line import named
from tformer_lib.transformer import ModelConfig


@dataclass(frozen=True)
class TrainingConfig:
    """Everything about one training run.

    Raises:
        ValueError: when a setting makes no sense alone; what must fit the data is checked when the run begins.
    """

    model: ModelConfig
    """The model. Its vocab_size is taken from the corpus, its max_length from the context."""
    preset: str = "quick"
    """The settings to start from: quick, stories, shakespeare-char or shakespeare-char-cpu; other flags change them."""
    data: str = "data/stories"
    """The corpus: a folder that `python -m tformer_lib.tokens` made."""
    out: str = "runs/quick"
    """The run's folder, for checkpoint, best weights and metrics."""
    batch: int = 32
    """Windows of text per step of the optimizer, over all its micro-batches."""
    context: int = 256
    """Tokens in a window."""
    steps: int = 300
    """Steps of the optimizer."""
    learning_rate: float = 1e-3
    """The peak learning rate."""
    min_learning_rate: float = 1e-4
    """The learning rate at the end of the cosine; a tenth of the peak is usual."""
    warmup: int = 100
    """Steps of linear warm-up: step t (from 0) has (t + 1) / (warmup + 1) of the peak."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Who takes the steps: AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
    muon_factor: float = 1.0
    """Muon's learning rate as a multiple of learning_rate; its updates are as long as AdamW's usually are."""
    beta1: float = 0.9
    """AdamW's memory of the gradient: about 1 / (1 - beta1) steps."""
    beta2: float = 0.99
    """AdamW's memory of the squared gradient; 0.99 where a batch has few tokens, 0.95 where it has many."""
    weight_decay: float = 0.1
    """Decay of every matrix, embeddings included; norms and biases are never decayed."""
    clip: float = 1.0
    """The longest gradient, as a norm over all parameters; longer ones are scaled down to it. 0 is off."""
    average: float = 0.0
    """Evaluate, show and keep a running average of the weights with this memory (0.995: some 200 steps); 0 is off."""
    token_noise: float = 0.0
    """The share of input tokens (never targets) that a random token replaces: keeps a large model from learning a small
    corpus by heart."""
    accumulation: int = 1
    """Micro-batches that a batch is cut into, to fit in memory; the gradient is that of the whole batch."""
    eval_interval: int = 100
    """Steps between evaluations on the validation text (the first is before step 0, the last after the last step)."""
    eval_windows: int = 0
    """Windows that an evaluation reads, the same every time, spread over the validation text; 0 is all of it."""
    save_interval: int = 100
    """Steps between checkpoints; the last step and Ctrl-C save too."""
    log_interval: int = 10
    """Steps between lines of the training loss in metrics.jsonl."""
    sample_tokens: int = 60
    """Tokens of the sample that follows each evaluation; 0 is none."""
    seed: int = 1337
    """Seeds the weights, the dropout and the choice of windows."""
    device: str = "auto"
    """Where to train: 'cpu', 'cuda', 'cuda:1'; 'auto' is the first GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of the matrix products; 'auto' is bfloat16 (autocast) on a GPU that has it, else float32."""
    compile: bool | None = None
    """Whether to fuse the model with torch.compile; None is: on a GPU yes, on a CPU no."""
    chunked_loss: bool | None = None
    """Whether the loss takes the logits of a chunk of tokens at a time, which saves memory; None is: where all of a
    micro-batch would be more than 256 MB."""
    fused_norms: bool = False
    """Whether a residual sum and the norm after it are one operator, on a GPU a Triton kernel. It serves models without
    dropout and biases, in one process or by ddp; others train as without it."""
    fused_gelu: bool = False
    """Whether a feed-forward layer like GPT-2's (gelu_tanh, no biases) takes GELU inside its matrix products, on a GPU
    those of cuBLASLt; others train as without it."""
    residual_in_fp32: bool = True
    """Whether the residual stream of a pre-norm model is in float32 where the matrix products are in bfloat16. Without
    it the stream is in bfloat16 too, which halves its bytes and rounds every sum."""
    cuda_graph: bool = False
    """Whether a step is captured as a CUDA graph, which the host starts by one call: AdamW, one process, no experts."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Where torchrun starts several processes: 'ddp' keeps the whole model in each of them, 'fsdp' a part in each."""
    tensor_parallel: int = 1
    """Processes that cut each matrix among them; the others hold the same pieces, which needs parallel fsdp."""
    context_parallel: int = 1
    """Processes that cut each window of text among them and attend round a ring."""
    expert_parallel: bool = False
    """Whether the processes share the experts of a mixture, each holding some of them."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self):
        at_least = {"batch": 1, "context": 1, "steps": 1, "warmup": 0, "accumulation": 1, "eval_interval": 1}
        at_least |= {"eval_windows": 0, "save_interval": 1, "log_interval": 1, "sample_tokens": 0, "seed": 0}
        at_least |= {"tensor_parallel": 1, "context_parallel": 1}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        named("data", self.data)
        named("out", self.out)
        if self.seed >= 2**32:  # which is as many as numpy's generator takes
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if self.batch % self.accumulation:
            raise ValueError(f"batch must be a multiple of accumulation, got {self.batch} and {self.accumulation}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be ddp or fsdp, got {self.parallel!r}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {self.optimizer!r}")
        if self.cuda_graph and (self.optimizer != "adamw" or self.model.experts):
            raise ValueError("cuda_graph captures the steps of AdamW, of models without experts")
        if not 0 < self.muon_factor < math.inf:
            raise ValueError(f"muon_factor must be positive and finite, got {self.muon_factor}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be a number of seconds above 0, got {self.timeout}")
        if not math.isfinite(self.learning_rate):
            raise ValueError(f"learning_rate must be finite, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be in [0, learning_rate = {self.learning_rate}], got {self.min_learning_rate}"
            )
        for name in ("beta1", "beta2", "average", "token_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def llama_like(**sizes) -> ModelConfig:
    """The shape that the presets share: RoPE, RMSNorm, SwiGLU, no biases. Vocabulary and length come from the run."""
    return ModelConfig(
        **{"vocab_size": 1, "norm": "rmsnorm", "feed_forward": "swiglu", "positions": "rope", "bias": False, **sizes}
    )


PRESETS = {
    config.preset: config
    for config in (
        TrainingConfig(  # what chapter 06 trains while you watch
            preset="quick",
            model=llama_like(width=128, layers=2, heads=4),
            batch=4, context=256, steps=400, learning_rate=3e-3, min_learning_rate=3e-4, warmup=30,
            eval_interval=100, eval_windows=64, save_interval=100,
        ),
        TrainingConfig(  # the model in tformer_lib/weights, which later chapters load
            preset="stories", data="data/stories-large", out="runs/stories",
            model=llama_like(width=192, layers=4, heads=8, head_dim=32, feed_forward_width=384),
            batch=128, context=256, steps=5000, learning_rate=2e-3, min_learning_rate=2e-5, warmup=200, beta2=0.98,
            eval_interval=250, save_interval=1000,
        ),
        TrainingConfig(  # nanoGPT's sizes, batch and rate for one GPU, with more against learning by heart
            preset="shakespeare-char", data="data/shakespeare-char", out="runs/shakespeare-char",
            model=llama_like(width=384, layers=6, heads=6, dropout=0.3), average=0.998, token_noise=0.1,
            batch=64, context=256, steps=5000, learning_rate=1e-3, min_learning_rate=1e-4, warmup=100,
            eval_interval=250, save_interval=1000, sample_tokens=200,
        ),
        TrainingConfig(  # nanoGPT's recipe for a CPU, with its 0.8 million parameters
            preset="shakespeare-char-cpu", data="data/shakespeare-char", out="runs/shakespeare-char-cpu",
            model=llama_like(width=128, layers=4, heads=4),
            batch=12, context=64, steps=2000, learning_rate=1e-3, min_learning_rate=1e-4, warmup=100,
            eval_interval=250, save_interval=250, sample_tokens=200,
        ),
    )
}  # fmt: skip


def preset(name: str, **changes) -> TrainingConfig:
    """The preset of that name, with some fields changed.

    Raises:
        ValueError: if there is no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


def config_from_dict(values: dict, source: str = "config") -> TrainingConfig:
    """The inverse of ``dataclasses.asdict``: what ``config.json`` and a checkpoint hold.

    Raises:
        ValueError: a setting is missing or unknown, or makes no sense; the message says which.
    """
    if isinstance(values, dict) and "model" in values:
        values = values | {"model": build(ModelConfig, values["model"], f"{source}.model")}
    return build(TrainingConfig, values, source)


def difference(theirs: dict, ours: dict) -> str:
    """What to do about a run that is already there, naming the first setting that differs."""
    for field in fields(TrainingConfig):
        if theirs.get(field.name) == ours[field.name]:
            continue
        if isinstance(ours[field.name], dict) and isinstance(theirs.get(field.name), dict):
            keys = ours[field.name] | theirs[field.name]
            key = next(k for k in keys if theirs[field.name].get(k) != ours[field.name].get(k))
            there, here = theirs[field.name].get(key), ours[field.name].get(key)
            return f"its {field.name}.{key} is {there!r}, yours is {here!r}; choose another --out"
        return f"its {field.name} is {theirs.get(field.name)!r}, yours is {ours[field.name]!r}; choose another --out"
    return "it has the same settings: resume it, or choose another --out"
