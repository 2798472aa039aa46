"""Complete prompts on the command line: the completions go to stdout, everything else to stderr."""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from jaxft.cli.command import (
    add_model_options,
    base_of,
    check_adapter,
    end_of_turn,
    exit_code,
    load_tokenizer,
    local,
    mesh_of,
    stop_ids,
)
from jaxft.data.chat import Renderer
from jaxft.data.conversations import Conversation, Message
from jaxft.generation.generate import generate
from jaxft.hub.consumers import adapter_of, consumers
from jaxft.hub.peft import load_adapter
from jaxft.hub.resolve import resolve_model
from jaxft.sharding import hosts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for bad input."""
    return exit_code(partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", required=True, action="append", metavar="TEXT", help="may be repeated")
    add("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    add("--chat-template", type=local, metavar="NAME", help="with --chat: chatml, or a Jinja file")
    add("--system", metavar="TEXT", help="with --chat: the system message")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="at most (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default): no draws")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens only")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    return parser


def _run(options: argparse.Namespace) -> None:
    if not options.chat and (options.system is not None or options.chat_template is not None):
        raise ValueError("--system and --chat-template are for conversations; add --chat")
    mesh = mesh_of(options)
    resolved = resolve_model(options.model, options.revision)
    directory = resolved.path
    check_adapter(options.adapter)
    tokenizer = load_tokenizer(directory, options.adapter)
    eos_ids = stop_ids(directory, options.adapter, tokenizer)
    if options.chat:
        renderer = Renderer(tokenizer, options.chat_template)
        prompts = [_ask(renderer, text, options.system) for text in options.prompt]
        eos_ids.update(end_of_turn(renderer))
    else:
        prompts = [plain_prompt(tokenizer, text) for text in options.prompt]
    for text, ids in zip(options.prompt, prompts, strict=True):
        if not ids:
            raise ValueError(f"--prompt {text!r} holds no token to go on from; give it a text")

    told: list[str] = []
    model = base_of(options, mesh, resolved)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
        told = consumers(adapter_of(model, directory))
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
    if not hosts.is_writer():
        return
    for prompt, completion in zip(prompts, completions, strict=True):
        print(_text(tokenizer, prompt, completion))
    for line in told:
        print(line, file=sys.stderr)
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


def plain_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text to go on from: what the tokenizer puts before a text, once, and nothing after it."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    begin = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    before, ids = whole[:begin], tokenizer(text, add_special_tokens=False).input_ids
    return ids if ids[:begin] == before else before + ids


def _ask(renderer: Renderer, text: str, system: str | None) -> list[int]:
    """The prompt for an answer to a user's message."""
    before = () if system is None else (Message("system", system),)
    turns = (*before, Message("user", text), Message("assistant", ""))
    prompt, _ = renderer.prompt(Conversation(turns, origin="--prompt"))
    return prompt.tolist()


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], completion: Sequence[int]) -> str:
    """The completion as it follows its prompt: decoded alone, some tokenizers drop the space before it."""
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, [*prompt, *completion])
    )
    return whole[len(before) :]
