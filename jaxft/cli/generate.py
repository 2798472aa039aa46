"""Complete prompts on the command line: the completions go to stdout, everything else to stderr."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxft.data.chat import Renderer
from jaxft.data.conversations import Conversation, Message
from jaxft.generation.generate import generate
from jaxft.hub.load import eos_token_ids, load_model
from jaxft.hub.peft import load_adapter
from jaxft.hub.resolve import resolve_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2 for what the user can put right, with one line that says what."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model directory or hub id")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--adapter", metavar="DIR", help="PEFT adapter directory; its tokenizer is used if it holds one")
    add("--prompt", required=True, action="append", metavar="TEXT", help="may be repeated")
    add("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    add("--chat-template", metavar="NAME", help="with --chat: chatml, or a Jinja file")
    add("--system", metavar="TEXT", help="with --chat: the system message")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="at most (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): no draws")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens only")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    add("--quantization", choices=("int8", "int4", "nf4"), help="quantize the weights while loading")
    return parser


def _run(options: argparse.Namespace) -> None:
    if not options.chat and (options.system is not None or options.chat_template is not None):
        raise ValueError("--system and --chat-template are for conversations; add --chat")
    directory = resolve_model(options.model, options.revision).path
    tokenizer = _load_tokenizer(directory, options.adapter)
    eos_ids = set(eos_token_ids(directory, tokenizer.eos_token_id))
    if options.chat:
        renderer = Renderer(tokenizer, options.chat_template)
        prompts = [_ask(renderer, text, options.system) for text in options.prompt]
        eos_ids |= _end_of_turn(renderer)
    else:
        prompts = [tokenizer(text).input_ids for text in options.prompt]

    model = load_model(options.model, options.dtype, options.quantization, revision=options.revision)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
    start = time.perf_counter()
    completions = generate(
        model,
        prompts,
        max_new_tokens=options.max_new_tokens,
        eos_ids=eos_ids,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    count, seconds = sum(map(len, completions)), time.perf_counter() - start
    for prompt, completion in zip(prompts, completions, strict=True):
        print(_text(tokenizer, prompt, completion))
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


def _load_tokenizer(model: Path, adapter: str | None) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer, which may have another chat template, or else the model's."""
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    directory = adapter if own else model
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file makes it raise nearly anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory}: no tokenizer can be loaded from it: {reason}") from error


def _ask(renderer: Renderer, text: str, system: str | None) -> list[int]:
    """The prompt for an answer to a user's message."""
    before = () if system is None else (Message("system", system),)
    turns = (*before, Message("user", text), Message("assistant", ""))
    prompt, _ = renderer.prompt(Conversation(turns, origin="--prompt"))
    return prompt.tolist()


def _end_of_turn(renderer: Renderer) -> set[int]:
    """The special token that ends an answer in the chat template; a base model's own files do not name it."""
    closing = renderer.template.special.search(renderer.template.end_of_turn)
    return {renderer.tokenizer.convert_tokens_to_ids(closing[0])} if closing else set()


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], completion: Sequence[int]) -> str:
    """The completion as it follows its prompt: decoded alone, some tokenizers drop the space before it."""
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, [*prompt, *completion])
    )
    return whole[len(before) :]
