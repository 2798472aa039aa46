"""What the commands share: how they begin and fail, whose tokenizer they use, and which tokens end an answer."""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from transformers import PreTrainedTokenizerBase

from jaxft.data import chat
from jaxft.data.chat import Renderer
from jaxft.hub.model_files import companions_of
from jaxft.paths import local_path
from jaxft.platform import devices_needed, prepared
from jaxft.sharding import hosts
from jaxft.training.stopping import Left, leaving


def exit_code(action: Callable[[], int | None]) -> int:
    """Do it, as one of several processes where this is one: its code or 0; 2 for what the user can put right.

    An error is one line on stderr. It ends all processes, and the line says which of them it befell. So does a signal.
    """
    try:
        with leaving(), prepared():
            with devices_needed():
                hosts.join()
                jax.devices()
            if not hosts.is_writer():
                logging.getLogger().setLevel(logging.ERROR)
                warnings.simplefilter("ignore")
            code = action() or 0
            hosts.part()
            return code
    except Left as left:
        return _failed(left.word, left.code)
    except (ValueError, OSError) as error:
        return _failed(f"error: {error}", 2)
    except Exception:
        if hosts.count() == 1:
            raise
        return _failed(traceback.format_exc(), 1)


def local(text: str) -> str:
    """An argument that is a path or a name on the hub, as `local_path` has it."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _failed(message: str, code: int) -> int:
    """The exit code. Of several processes one that failed ends here: a regular exit would wait for the others."""
    if hosts.count() == 1:
        print(message, file=sys.stderr)
        return code
    print(f"{hosts.name()}: {message}", file=sys.stderr)
    hosts.fail(message, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def load_tokenizer(model: Path, adapter: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer, which may have another chat template, or else the model's."""
    own = adapter is not None and (Path(adapter) / "tokenizer_config.json").exists()
    return chat.load_tokenizer(adapter if own else companions_of(model))


def end_of_turn(renderer: Renderer) -> set[int]:
    """The tokens that end an answer in the chat template; a base model's own files do not name them."""
    stops = renderer.template.stops if renderer.template else ()
    return set(renderer.tokenizer.convert_tokens_to_ids(list(stops)))
