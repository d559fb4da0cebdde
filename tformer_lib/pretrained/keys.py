"""Reading a config.json so that no key of it is dropped without a word."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

MISSING = object()

ABOUT_THE_FILE = frozenset(
    """
    _attn_implementation _name_or_path architectures auto_map dtype finetuning_task model_type problem_type
    tokenizer_class torch_dtype transformers_version unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905
)

ABOUT_TOKENS = frozenset(
    """
    bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id forced_eos_token_id id2label label2id
    pad_token_id prefix sep_token_id task_specific_params
    """.split()  # noqa: SIM905
)

ABOUT_RUNNING = frozenset(
    """
    chunk_size_feed_forward initializer_range output_attentions output_hidden_states output_scores pruned_heads
    return_dict tf_legacy_loss torchscript use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)

ABOUT_WRITING = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)

ABOUT_PAIRS = frozenset(
    """
    add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder
    """.split()  # noqa: SIM905
)

HARMLESS = ABOUT_THE_FILE | ABOUT_TOKENS | ABOUT_RUNNING | ABOUT_WRITING | ABOUT_PAIRS
"""Keys that say nothing about what a model computes: how to train it, how to write with it, who made the file."""


class Keys:
    """The keys of a config, each of which must be asked for; those that nobody asked for are refused at the end.

    Args:
        config: what a ``config.json`` holds.
        source: what an error calls it.
    """

    def __init__(self, config: dict, source: str = "config.json"):
        self.config, self.source, self.unread = config, source, set(config) - HARMLESS

    def take(self, name: str, default: Any = MISSING) -> Any:
        """The value of a key; a missing one, or one that says null, has the default.

        Raises:
            ValueError: it is missing, and there is no default.
        """
        self.unread.discard(name)
        value = self.config.get(name)
        if value is None:
            if default is MISSING:
                raise self.lacks(name)
            return default
        return value

    def take_or_null(self, name: str, default: Any) -> Any:
        """The value of a key, of which null says that there is none; a missing one has the default."""
        return self.take(name, None) if name in self.config else default

    def lacks(self, name: str) -> ValueError:
        """The error of a key that is missing."""
        return ValueError(f"{self.source} is of another version: it lacks {name}")

    def ignore(self, *names: str) -> None:
        """Keys of this family that change nothing in the forward pass."""
        self.unread -= set(names)

    def must_be(self, **expected: Any) -> None:
        """Refuse a config that asks for something else than what is built here; a missing key is what is built.

        Raises:
            ValueError: the message names the key.
        """
        for name, value in expected.items():
            self.unread.discard(name)
            found = self.config.get(name)
            if found is not None and found != value:
                raise ValueError(f"{name} must be {value!r} to be read here, got {found!r}")

    def finish(self) -> None:
        """Refuse keys that were not read.

        Raises:
            ValueError: the message names them.
        """
        if self.unread:
            raise ValueError(f"{self.source} has {', '.join(sorted(self.unread))}, which is not known here")


def read_config(path: Path) -> dict:
    """A ``config.json``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON object, or says that the weights are quantised.
    """
    config = read_object(path)
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        method = method or "a method that it does not name"
        raise ValueError(f"{path} says that the weights are quantised ({method}), which cannot be read here")
    return config


LARGEST_JSON = 2**26
"""Bytes of the largest file that is read as JSON: the index of 100,000 tensors takes a tenth of that."""


def read_object(path: Path) -> dict:
    """The JSON object that a file of a checkpoint holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, no JSON, or no object, or says something twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes, more than the {LARGEST_JSON:,} that are read")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=said_once)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object, but {found!r:.40}")
    return found


def said_once(pairs: list[tuple[str, Any]]) -> dict:
    """The pairs of a JSON object as a dictionary; of two with one key, readers would not agree which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it says {counts.most_common(1)[0][0]} twice")
    return found
