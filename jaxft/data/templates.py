"""Which chat template a run uses: the tokenizer's own, a built-in one, or a file's.

The built-in `chatml` suits every tokenizer. It begins with BOS where the tokenizer puts one before a text. Where the
tokenizer has no token `<|im_end|>`, turns end in EOS instead: in letters it would not stop generation.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def find_template(tokenizer: PreTrainedTokenizerBase, name: str | None, adds_bos: bool) -> str | None:
    """The template that `name` stands for; None if the tokenizer has none and none was asked for.

    Args:
        name: a name among the tokenizer's own templates, `chatml`, a path of a Jinja file, or the template itself;
            None = the tokenizer's default, if it has one.
        adds_bos: the tokenizer puts BOS before every text.

    Raises:
        ValueError: there is no such name or file, or several and none was chosen.
    """
    own = own_templates(tokenizer)
    if name is None and own and "default" not in own:
        raise ValueError(f"the tokenizer has several chat templates; set `chat_template` to one of: {', '.join(own)}")
    if name is None or name in own:
        return own.get(name or "default")
    if name == "chatml":
        return _chatml(tokenizer, adds_bos)
    if "{{" in name or "{%" in name:
        return name
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        names = ", ".join(dict.fromkeys(["chatml", *own]))
        raise ValueError(f"chat template {name!r}: no such file, and no name among: {names}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"chat template {name!r}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def own_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The templates that came with a tokenizer, by name."""
    own = tokenizer.chat_template or {}
    return {"default": own} if isinstance(own, str) else own


def _chatml(tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> str:
    source = CHATML
    if "<|im_end|>" not in {token.content for token in tokenizer.added_tokens_decoder.values()}:
        if tokenizer.eos_token is None:
            raise ValueError(
                "chat_template chatml: the tokenizer has neither <|im_end|> nor an eos_token, so that nothing could "
                "end an answer; give it one, or use a template whose turns end in a token that it has"
            )
        source = source.replace("'<|im_end|>\\n'", "eos_token + '\\n'")
    return "{{- bos_token }}" + source if adds_bos else source
