"""What the commands share: how they fail, whose tokenizer they use, and which tokens end an answer."""

import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from jaxft.data import chat
from jaxft.data.chat import Renderer
from jaxft.hub.model_files import companions_of


def exit_code(action: Callable[[], None]) -> int:
    """Do it: 0, or 2 and one line on stderr for what the user can put right."""
    try:
        action()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_tokenizer(model: Path, adapter: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer, which may have another chat template, or else the model's."""
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    return chat.load_tokenizer(adapter if own else companions_of(model))


def end_of_turn(renderer: Renderer) -> set[int]:
    """The special token that ends an answer in the chat template; a base model's own files do not name it."""
    if renderer.template is None:
        return set()
    closing = renderer.template.special.search(renderer.template.end_of_turn)
    return {renderer.tokenizer.convert_tokens_to_ids(closing[0])} if closing else set()
