"""nano-vllm on the requests of ``benchmarks/serving.py``: the parts "nano-vllm" and "nano-vllm, 64 GiB".

nano-vllm (https://github.com/GeeeekExplorer/nano-vllm) is not a dependency and its sources are not copied. Put a
checkout of it on PYTHONPATH, and vLLM's build of FlashAttention-3 too. For a fair run beside our engine:

- Its model is Qwen3's with biases, which skips the norms of queries and keys: the Llama shape, and three biases more.
  The weights are random, like ours.
- The package ``flash_attn`` that it imports is FlashAttention-2. Here FlashAttention-3, which is made for this GPU,
  stands behind that import.
- Its sampler divides by a temperature and draws; an argmax takes its place, because our requests are greedy.
- It gets the same requests, the same bytes of keys and values (in its blocks of 256 tokens), as many rows, and steps of
  up to 16,384 tokens, its default. It records CUDA graphs, as it does by default. Its prefix cache stays on, so the
  second run has other prompts of the same lengths.
- Python's garbage collector leaves alone what there is after the start, as in our process.
"""

import atexit
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from random import Random
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from tformer_lib.serving import freeze_heap
from tformer_lib.transformer import ModelConfig


def flash_attention_3() -> ModuleType:
    """A module with the two functions that nano-vllm imports from ``flash_attn``, computed by FlashAttention-3."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func as varlen

    module, starts = ModuleType("flash_attn"), {}

    def prefill(q, k, v, *, cu_seqlens_k, block_table=None, **options):
        if block_table is None:
            return varlen(q, k, v, cu_seqlens_k=cu_seqlens_k, fa_version=3, **options)
        options["seqused_k"] = cu_seqlens_k.diff().int()
        return varlen(q, k, v, block_table=block_table, fa_version=3, **options)

    def decode(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal):
        rows = len(q)
        if rows not in starts:
            starts[rows] = torch.arange(rows + 1, device=q.device, dtype=torch.int32)
        options = {"block_table": block_table, "softmax_scale": softmax_scale, "causal": causal, "fa_version": 3}
        longest = block_table.shape[1] * k_cache.shape[1]
        out = varlen(q[:, 0], k_cache, v_cache, 1, starts[rows], longest, seqused_k=cache_seqlens, **options)
        return out[:, None]

    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = prefill, decode
    return module


class Greedy(nn.Module):
    """In place of nano-vllm's sampler."""

    def forward(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        """(rows, vocab_size) -> (rows,)."""
        return logits.argmax(-1)


def randomise(model: nn.Module, path: str) -> None:
    """In place of nano-vllm's loader: weights of the usual size."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)
        else:
            parameter.data.fill_(0.0 if "bias" in name else 1.0)


def make_server(config: ModelConfig, memory: int, rows: int):
    """nano-vllm's ``LLM`` of a shape, with so many bytes of keys and values."""
    sys.modules["flash_attn"] = flash_attention_3()
    import nanovllm.engine.llm_engine as engine
    import nanovllm.engine.model_runner as runner
    from nanovllm import LLM
    from transformers import Qwen3Config

    tokenizer = SimpleNamespace(eos_token_id=-1, decode=lambda tokens: "")
    engine.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *args, **options: tokenizer)
    runner.load_model, runner.Sampler = randomise, Greedy
    allocate = runner.ModelRunner.allocate_kv_cache

    def allocate_so_much(self) -> None:
        """The share of the GPU from which its own formula gets ``memory`` bytes."""
        shape = self.config.hf_config
        block = 4 * shape.num_hidden_layers * self.block_size * shape.num_key_value_heads * shape.head_dim
        free, total = torch.cuda.mem_get_info()
        now = torch.cuda.memory_stats()
        taken = total - free + now["allocated_bytes.all.peak"] - now["allocated_bytes.all.current"]
        self.config.gpu_memory_utilization = (memory + block / 2 + taken) / total
        allocate(self)
        print(f"nano-vllm: {self.config.num_kvcache_blocks * block / 2**30:.2f} GiB of keys and values", flush=True)

    runner.ModelRunner.allocate_kv_cache = allocate_so_much
    with tempfile.TemporaryDirectory() as folder:
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.feed_forward_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_length,
            rope_theta=config.rope_base,
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=True,
            attention_bias=True,
            dtype="bfloat16",
        ).save_pretrained(folder)
        options = {"max_model_len": config.max_length, "max_num_seqs": rows, "max_num_batched_tokens": 16384}
        server = LLM(folder, **options)
    atexit.unregister(server.exit)  # it need not be taken down: the process ends with it
    return server


def time_server(server, requests: Sequence[tuple[list[int], int]], vocab_size: int, *, runs: int = 2) -> list[float]:
    """Seconds for all requests, run by run, each with fresh prompts of the same lengths."""
    from nanovllm import SamplingParams

    random, seconds = Random(1), []
    server.generate([[1] * 300] * 8, SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0), use_tqdm=False)
    freeze_heap()
    for _ in range(runs):
        fresh = [([random.randrange(vocab_size) for _ in prompt], new) for prompt, new in requests]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for prompt, new in fresh:
            server.add_request(prompt, SamplingParams(max_tokens=new, ignore_eos=True, temperature=1.0))
        while not server.is_finished():
            server.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        print(f"nano-vllm: {seconds[-1]:.2f} s", flush=True)
    return seconds


def is_there() -> bool:
    """Whether nano-vllm and FlashAttention-3 can be imported."""
    return all(find_spec(name) is not None for name in ("nanovllm", "vllm", "transformers"))
