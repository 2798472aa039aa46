"""From examples to tokens and loss masks.

A conversation is rendered once by its chat template (`jaxft.data.turns` says which characters the model
learns) and the whole text is tokenized once, so that the tokens are those of `tokenizer.apply_chat_template`.
A token is learned if its first character is: one that straddles the border between a prompt and an answer
belongs to the prompt.

Special tokens are written by templates only. Where a content spells one (`<|im_start|>` in a user's
message), the token is replaced by the ordinary tokens of its letters, so that no content can open or close a
turn.

A completion is prompt + completion + EOS, a text is text + EOS, each after BOS if the tokenizer adds one.
"""

from collections.abc import Iterable, Sequence
from datetime import date
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from rich.text import Text as Styled
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxft.data.conversations import Conversation
from jaxft.data.formats import Completion, Example, Text
from jaxft.data.tokenized import Tokenized
from jaxft.data.turns import ChatTemplate, Rendered

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
#: The day that templates with a date are told, always the same so that a resumed run reads the same tokens.
TODAY = date(2024, 7, 26)
_CHUNK = 256  # examples tokenized in one call


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's or adapter's directory; runs no code from it.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a damaged file makes it raise nearly anything
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it is code of its own, which is never run; save it with a tokenizer.json, from where you trust it"
        if any(Path(directory).glob("*.gguf")):
            reason = "put the original model's tokenizer files beside the GGUF file, whose own copy is not read"
        raise ValueError(f"{directory}: no tokenizer can be loaded from it: {reason}") from error


class Renderer:
    """Turns examples into tokens with a loss mask.

    Args:
        tokenizer: a fast tokenizer of transformers.
        chat_template: a name among the tokenizer's own templates, `chatml`, a path of a Jinja file, or the
            template itself; None = the tokenizer's default, if it has one.
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
        specials = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._is_special = np.zeros(max(specials, default=-1) + 2, bool)
        self._is_special[list(specials)] = True
        beginning = tokenizer("a", verbose=False).input_ids[:1]
        self._bos = beginning if beginning == [tokenizer.bos_token_id] else []
        source = _find_template(tokenizer, chat_template)
        self.template = source and ChatTemplate(
            source, tokenizer.special_tokens_map, specials.values(), today, time_limit
        )
        self._spell = lru_cache(self._spell_out)

    def encode(self, examples: Iterable[Example], *, assistant_only_loss: bool = True) -> list[Tokenized]:
        """Tokens and masks of the examples, in their order.

        Args:
            examples: conversations, completions or texts.
            assistant_only_loss: learn assistant turns and completions; False = every token but the first.

        Raises:
            ValueError: with the example's origin.
        """
        examples, encoded = iter(examples), []
        while chunk := [self._render(example) for example in islice(examples, _CHUNK)]:
            encoded += self._tokenize(chunk)
        if not assistant_only_loss:
            encoded = [Tokenized(tokens, np.arange(len(tokens)) > 0) for tokens, _ in encoded]
        return encoded

    def prompt(self, example: Conversation | Completion) -> tuple[np.ndarray, str]:
        """The tokens (int32[n]) that ask for the last answer of an example, and that answer."""
        if isinstance(example, Completion):
            rendered = Rendered(example.prompt, (), ((0, len(example.prompt)),), add_bos=True)
            return self._tokenize([rendered])[0].tokens, example.completion
        if isinstance(example, Text):
            raise ValueError(f"{example.origin}: plain text has no prompt to answer")
        last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
        try:
            rendered = self._need_template().prompt(example.messages[:last], example.tools)
        except ValueError as error:
            raise ValueError(f"{example.origin}: {error}") from None
        return self._tokenize([rendered])[0].tokens, example.messages[last].content

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

    def _render(self, example: Example) -> Rendered:
        if isinstance(example, Completion):
            asked, text = len(example.prompt), example.prompt + example.completion
            return Rendered(text, ((asked, len(text)),), ((0, len(text)),), add_bos=True, add_eos=True)
        if isinstance(example, Text):
            whole = ((0, len(example.text)),)
            return Rendered(example.text, whole, whole, add_bos=True, add_eos=True)
        try:
            return self._need_template().render(example)
        except ValueError as error:
            raise ValueError(f"{example.origin}: {error}") from None

    def _tokenize(self, rendered: Sequence[Rendered]) -> list[Tokenized]:
        encoding = self.tokenizer(
            [one.text for one in rendered],
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(rendered, encoding.input_ids, encoding.offset_mapping, strict=True)
        return [self._mask(one, np.asarray(ids, np.int32), offsets) for one, ids, offsets in pairs]

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


def _find_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str | None:
    """The template that `name` stands for; None if the tokenizer has none and none was asked for."""
    own = tokenizer.chat_template or {}
    own = {"default": own} if isinstance(own, str) else own
    named = {"chatml": CHATML, **own}
    if name is None and own and "default" not in own:
        raise ValueError(f"the tokenizer has several chat templates; set `chat_template` to one of: {', '.join(own)}")
    if name is None or name in named:
        return named.get(name or "default")
    if "{{" in name or "{%" in name:
        return name
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"chat template {name!r}: no such file, and no name among: {', '.join(named)}") from None
