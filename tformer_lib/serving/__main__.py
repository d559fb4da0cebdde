"""``python -m tformer_lib.serving``: prompts from the command line or a file."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from tformer_lib import pretrained
from tformer_lib.serving.engine import DEFAULT_MEMORY, LLM, blocks_that_fit
from tformer_lib.serving.request import Params


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve prompts from the command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    where.add_argument("--prompts", type=Path, help='a file with one {"prompt": "...", "temperature": ...} a line')
    parser.add_argument("--model", default="stories", help="a pretrained model of the library")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=int, default=DEFAULT_MEMORY, help="bytes of keys and values")
    parser.add_argument("--seats", type=int, default=64, help="requests that run at once")
    parser.add_argument("--budget", type=int, default=512, help="tokens computed in a step")
    for name in ("max_new_tokens", "top_k", "seed"):
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        parser.add_argument("--" + name.replace("_", "-"), type=float)
    parser.add_argument("--stop", action="append", help="end before this string; may be given several times")
    options = vars(parser.parse_args(arguments))
    asked = {field.name: options[field.name] for field in fields(Params) if options.get(field.name) is not None}
    serve(options, asked)


def serve(options: dict, asked: dict) -> None:
    """Run the command: stream a single prompt, or print one line of JSON for each request."""
    model, encoding = pretrained.load(options["model"], device=options["device"])
    blocks = blocks_that_fit(model, options["memory"])
    llm = LLM(model, encoding, blocks=blocks, seats=options["seats"], budget=options["budget"])
    asked = {"stop_tokens": [encoding.eot_token], **asked}
    if options["prompt"] and len(options["prompt"]) == 1:
        print(options["prompt"][0], end="", flush=True)
        for piece in llm.stream(options["prompt"], asked):
            print(piece.text, end="", flush=True)
        print()
        return
    lines = read_lines(options["prompts"]) if options["prompts"] else [{"prompt": text} for text in options["prompt"]]
    prompts = [line.pop("prompt", "") for line in lines]
    for request in llm.generate(prompts, [{**asked, **line} for line in lines]):
        line = {"id": request.id, "text": request.text, "finish_reason": request.finish_reason}
        print(json.dumps(line if request.error is None else {**line, "error": request.error}, ensure_ascii=False))


def read_lines(path: Path) -> list[dict]:
    """The requests of a file, one JSON object a line; empty lines are skipped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            sys.exit(f"{path}, line {number}: one JSON object was expected ({error})")
    return requests


if __name__ == "__main__":
    main()
