"""Let a search for a chapter's subject find the chapter first.

Sphinx ranks pages by whether a word stands in them, not by how much they are about it, and orders equals by the
alphabet. So each chapter says here what it is about, in the words that a reader may type; a search for one of them
shows the chapter above the glossary's entry and the pages that only mention it.
"""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

SUBJECTS = {
    "01-tokens": "tokens, tokenizer, byte-pair encoding, BPE, vocabulary, corpus, merges",
    "02-attention": "attention, scaled dot product, softmax, multi-head attention, self-attention, query key value",
    "03-masks": "mask, causal mask, padding mask, prefix mask, document mask, window mask",
    "04-positional-encoding": "positional encoding, sinusoidal, ALiBi, T5 bias, learned positions",
    "05-transformer": "encoder-decoder, layer norm, RMSNorm, residual stream, pre-norm, SwiGLU, feed-forward",
    "06-training": "training, learning rate, warm-up, AdamW, gradient clipping, cross-entropy, validation loss",
    "08-rope": "RoPE, rotary, rotary position embedding, YaRN, NTK, context extension",
    "09-kv-cache": "KV cache, prefill, decode, generation, sampling, temperature, top-p, top-k, attention sinks",
    "10-grouped-query-attention": "GQA, MQA, MLA, multi-query attention, latent attention, kv heads",
    "11-sparse-attention": "sparse attention, sliding window, Longformer, BigBird, block-sparse, receptive field",
    "12-linear-attention": "linear attention, kernel trick, Performer, random features, recurrent, delta rule",
    "15-flash-math": "flash attention, online softmax, tiles, logsumexp, recomputation",
    "16-flash-kernels": "flash attention kernel, CUDA, tensor cores, shared memory, bank conflict, swizzle, TMA, warp",
    "18-paged-attention": "paged attention, block table, copy on write, prefix cache, fragmentation, vLLM, eviction",
    "19-serving": "serving, continuous batching, scheduler, preemption, chunked prefill, throughput, latency",
    "20-profiling": "profiling, profiler, roofline, arithmetic intensity, Amdahl, CUDA graph, launch overhead",
}
"""Chapter -> what it is about."""


def forms(subject: str) -> set[str]:
    """How a subject may be typed: with its hyphens, or with spaces for them."""
    return {subject, subject.replace("-", " ")}


def announce(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Give the chapter its subjects, for the search alone; the glossary's entries come after them."""
    if page == "glossary":
        for node in doctree.findall(addnodes.index):
            node["entries"] = [(kind, value, target, "", key) for kind, value, target, _, key in node["entries"]]
    subjects = SUBJECTS.get(Path(page).name) if page.startswith("notebooks/") else None
    if subjects:
        words = sorted(set().union(*map(forms, subjects.split(", "))))
        doctree.insert(0, addnodes.index(entries=[("single", word, "", "main", None) for word in words]))


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("doctree-resolved", announce)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
