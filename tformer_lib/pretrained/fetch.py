"""Where the files of a public model are: in a folder, or on the Hugging Face hub, from which they are fetched."""

from pathlib import Path

from tformer_lib.pretrained.shards import INDEX

FILES = ["config.json", "generation_config.json", "*.safetensors", INDEX, "tokenizer*", "chat_template*"]
"""What is fetched of a model on the hub: nothing that could be executed."""


def is_hub_name(name: str | Path) -> bool:
    """Whether a name is one of the hub's, owner/name, and no path."""
    return str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself, or where the hub's files lie once they are fetched.

    Raises:
        FileNotFoundError: it is no folder, and could not be fetched; the message says why.
    """
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise FileNotFoundError(f"there is no folder {name}; a model on the hub is called owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {name}; to fetch it from the hub, pip install 'tformer-lab[hub]'"
        ) from None
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=FILES))
    except Exception as error:  # of the network, the hub or its library, which has many kinds
        raise FileNotFoundError(
            f"there is no folder {name}, and it could not be fetched from the hub (is there a network, and is the name "
            f"right?): {type(error).__name__}: {error}"
        ) from error
