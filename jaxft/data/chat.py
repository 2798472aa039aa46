"""Turns examples into tokens and loss masks.

A conversation is rendered once by its chat template (`jaxft.data.turns` says which characters the model
learns) and the whole text is tokenized once, so that the tokens are those of `tokenizer.apply_chat_template`.
A token is learned if its first character is: one that straddles the border between a prompt and an answer
belongs to the prompt.

Special tokens are written by templates only. Where a content spells one (`<|im_start|>` in a user's
message), the token is replaced by the ordinary tokens of its letters, so that no content can open or close a
turn. An event counts it.

Texts and completions have no template (`jaxft.data.continuations`).
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.text import Text as Styled
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxft.data import shown
from jaxft.data.continuations import Continuations
from jaxft.data.conversations import Conversation, Message
from jaxft.data.events import Event
from jaxft.data.formats import Completion, Example, Text
from jaxft.data.records import BadRecord
from jaxft.data.signs import any_of
from jaxft.data.template_process import OUTPUT_LIMIT, OutputLimitError, StoppedError
from jaxft.data.templates import find_template, own_templates
from jaxft.data.tokenized import Tokenized
from jaxft.data.turns import ChatTemplate, Rendered
from jaxft.limits import NoMemoryError, memory_for

logger = logging.getLogger(__name__)

#: The date for templates that write one. It never changes, so that a resumed run reads the same tokens.
TODAY = date(2024, 7, 26)
#: Markup of Llama 2, which is letters to its own tokenizer.
_LETTERS = ("[INS", "[/IN", "<<SY", "<</S")
_CHUNK = 256  # examples tokenized in one call


class Encoded(NamedTuple):
    """The tokens of an example, and the events on the way to them."""

    tokenized: Tokenized
    events: tuple[Event, ...]


class TooLong(NamedTuple):
    """An example with too many characters to be tokenized."""

    characters: int


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's or adapter's directory; runs no code from it.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        with memory_for(directory):
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except NoMemoryError:
        raise
    except Exception as error:  # a damaged file makes it raise nearly anything
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it is code of its own, which is never run; save it with a tokenizer.json, from where you trust it"
        if any(Path(directory).glob("*.gguf")):
            reason = "put the original model's tokenizer files beside the GGUF file, whose own copy is not read"
        raise ValueError(f"{directory}: no tokenizer can be loaded from it: {reason}") from error
    _tell_missing_bos(tokenizer, Path(directory))
    return tokenizer


def _tell_missing_bos(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """transformers 5 adds the BOS that tokenizer.json asks for; made from `tokenizer.model` alone, it adds none."""
    alone = (directory / "tokenizer.model").exists() and not (directory / "tokenizer.json").exists()
    if not alone or tokenizer.bos_token_id is None or "add_bos_token" in _settings(directory):
        return
    if tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        logger.warning(
            "%s holds tokenizer.model and no tokenizer.json: with such a tokenizer transformers adds no %s to a text, "
            "though most models that have one expect it; put the original's tokenizer.json beside it, or set "
            "add_bos_token in tokenizer_config.json",
            directory,
            tokenizer.bos_token,
        )


def _settings(directory: Path) -> dict:
    path = directory / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


class Renderer:
    """Turns examples into tokens with a loss mask.

    Args:
        tokenizer: a fast tokenizer of transformers.
        chat_template: as in `templates.find_template`.
        today: the date for templates that write one.
        time_limit: seconds that the template may take for one conversation.

    Raises:
        ValueError: a template that is not found, does not compile or does not render a question and its
            answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        *,
        today: date = TODAY,
        time_limit: float = 20.0,
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: it cannot tell where its tokens stand"
            )
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        specials = {index: token.content for index, token in added.items() if token.special}
        self._special = any_of(specials.values())
        self._own_markup = " ".join(token.content for token in added.values())
        self._is_special = np.zeros(max(specials, default=-1) + 2, bool)
        self._is_special[list(specials)] = True
        self._bos = _put_first(tokenizer)
        source = find_template(tokenizer, chat_template, tokenizer.bos_token_id in self._bos)
        self.template = source and ChatTemplate(
            source,
            tokenizer.special_tokens_map,
            specials.values(),
            today,
            time_limit,
            [token.content for token in added.values()],
        )
        self._continuations = Continuations(
            tokenizer.bos_token, tokenizer.eos_token, bool(self._bos), self.template, self._special, self._own_markup
        )
        if self.template and chat_template != "chatml" and source not in own_templates(tokenizer).values():
            self._tell_of_tokens()
        self._spell = lru_cache(self._spell_out)

    def encode(
        self, examples: Iterable[Example], *, assistant_only_loss: bool = True
    ) -> list[Encoded | BadRecord | TooLong]:
        """The result for each example, in their order.

        Args:
            examples: conversations, completions or texts.
            assistant_only_loss: learn assistant turns and completions; False = every token but the first.

        Raises:
            ValueError: with the example's origin: its template runs for too long, or it has none.
        """
        examples, encoded = iter(examples), []
        while chunk := list(islice(examples, _CHUNK)):
            encoded += self._encode(chunk, assistant_only_loss)
        return encoded

    def _encode(
        self, examples: Sequence[Example], assistant_only_loss: bool
    ) -> Iterator[Encoded | BadRecord | TooLong]:
        rendered = [self._try_to_render(example) for example in examples]
        tokens = iter(self._tokens([one for one in rendered if isinstance(one, Rendered)]))
        for example, one in zip(examples, rendered, strict=True):
            if not isinstance(one, Rendered):
                yield one
                continue
            try:
                tokenized = self._mask(one, *next(tokens))
            except ValueError as error:
                yield BadRecord(example.origin, str(error))
                continue
            if not assistant_only_loss:
                tokenized = Tokenized(tokenized.tokens, np.arange(len(tokenized.tokens)) > 0)
            yield Encoded(tokenized, one.events)

    def is_rendered(self, text: str) -> bool:
        """Whether a text was already rendered with the chat template."""
        return self.template is not None and self.template.is_rendered(text)

    def prompt(self, example: Conversation | Completion) -> tuple[np.ndarray, str]:
        """The tokens (int32[n]) that ask for the last answer of an example, and that answer."""
        try:
            if isinstance(example, Text):
                raise ValueError("plain text has no prompt to answer")
            if isinstance(example, Completion):
                rendered, reference = self._continuations.prompt(example), example.completion
            else:
                last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
                rendered = self._need_template().prompt(example.messages[:last], example.tools)
                reference = example.messages[last].content
            return self._mask(rendered, *next(iter(self._tokens([rendered])))).tokens, reference
        except ValueError as error:
            raise ValueError(f"{example.origin}: {error}") from None

    def show(self, example: Tokenized) -> Styled:
        """The example as text, with what is learned in bold green between ⟦ and ⟧."""
        mask = example.loss_mask
        borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1), len(mask)]
        shown, before = Styled(), ""
        for start, end in pairwise(borders):
            # Decoded from the beginning, as some tokenizers drop the space before the first token.
            text = self.tokenizer.decode(example.tokens[:end], clean_up_tokenization_spaces=False)
            piece, before = text[len(before) :], text
            shown.append(f"⟦{piece}⟧" if mask[start] else piece, "bold green" if mask[start] else "")
        return shown

    def _need_template(self) -> ChatTemplate:
        if self.template is None:
            raise ValueError(
                "a conversation needs a chat template and the tokenizer has none; set `chat_template` to "
                "`chatml` or to the path of a Jinja file"
            )
        return self.template

    def _try_to_render(self, example: Example) -> Rendered | BadRecord | TooLong:
        try:
            template = self._need_template() if isinstance(example, Conversation) else None
            self._eos()
        except ValueError as error:  # affects all examples alike
            raise ValueError(f"{example.origin}: {error}") from None
        try:
            return template.render(example) if template else self._continuations.render(example)
        except OutputLimitError:
            return TooLong(OUTPUT_LIMIT)
        except StoppedError as error:
            raise ValueError(f"{example.origin}: {error}") from None
        except ValueError as error:
            return BadRecord(example.origin, str(error))

    def _tell_of_tokens(self) -> None:
        """Warn of a template that was written for another tokenizer."""
        text = self.template.prompt([Message("user", "question")]).text
        if self._bos and not self._continuations.begins_with_bos(text):
            logger.warning(
                "the chat template does not begin with %s, which the tokenizer puts before every text; "
                "if the model was trained with it, begin the template with {{ bos_token }}",
                self.tokenizer.decode(self._bos),
            )
        letters = [found for found in shown.markup_in_letters(text, self._own_markup) if found[:4] not in _LETTERS]
        if letters:
            logger.warning(
                "the chat template writes %s, which this tokenizer has as letters, not as tokens; "
                "is the template another model's?",
                ", ".join(letters),
            )

    def _tokens(self, rendered: Sequence[Rendered]) -> Iterator[tuple[np.ndarray, Sequence[tuple[int, int]]]]:
        """Tokens, int32[n], and their places in each text, before what a content spells is taken as letters."""
        encoding = self.tokenizer(
            [one.text for one in rendered],
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
            yield np.asarray(ids, np.int32), offsets

    def _mask(self, rendered: Rendered, tokens: np.ndarray, offsets: Sequence[tuple[int, int]]) -> Tokenized:
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        # Where offsets leave out blanks, a token still begins no later than where the one before ended.
        starts = np.minimum(starts, np.maximum.accumulate(np.concatenate([[0], ends[:-1]])))
        learned = _within(rendered.supervised, len(rendered.text))[starts]
        special = self._is_special[np.minimum(tokens, len(self._is_special) - 1)]
        content = _within(rendered.content, len(rendered.text))
        pieces, masks, done = [], [], 0
        for index in np.flatnonzero(special & content[starts]):
            text = rendered.text[starts[index] : ends[index]]
            if not content[ends[index] - len(text.lstrip())]:
                continue  # the template's own token, which takes in the blanks before it
            letters = self._spell(text)
            pieces += [tokens[done:index], letters]
            masks += [learned[done:index], np.repeat(learned[index], len(letters))]
            done = index + 1
        bos, eos = (self._bos if rendered.add_bos else []), (self._eos() if rendered.add_eos else [])
        tokens = np.concatenate([bos, *pieces, tokens[done:], eos]).astype(np.int32)
        learned = np.concatenate([np.zeros(len(bos)), *masks, learned[done:], np.ones(len(eos))]).astype(bool)
        learned[:1] = False
        return Tokenized(tokens, learned)

    def _spell_out(self, text: str) -> np.ndarray:
        """The ordinary tokens of a text that spells a special token, as they come in the middle of a line."""
        encoding = self.tokenizer(
            "\n" + text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        starts = [start for start, _ in encoding.offset_mapping]
        tokens = np.asarray(encoding.input_ids)[starts.index(1) if 1 in starts else 0 :]
        if 1 not in starts or self._is_special[np.minimum(tokens, len(self._is_special) - 1)].any():
            raise ValueError(f"the tokenizer cannot write {text!r} as ordinary text; take it out of the data")
        return tokens

    def _eos(self) -> list[int]:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, so the model could not learn where to stop")
        return [self.tokenizer.eos_token_id]


def _within(spans: Iterable[tuple[int, int]], length: int) -> np.ndarray:
    """bool[length + 1]: whether each character is in one of the spans."""
    inside = np.zeros(length + 1, bool)
    for start, end in spans:
        inside[start:end] = True
    return inside


def _put_first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text: BOS, or none, or others."""
    tokens, plain = (
        tokenizer("a", verbose=False).input_ids,
        tokenizer("a", add_special_tokens=False, verbose=False).input_ids,
    )
    return tokens[: next((i for i in range(len(tokens)) if tokens[i : i + len(plain)] == plain), 0)]
