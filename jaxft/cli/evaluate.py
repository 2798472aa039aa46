"""Loss and perplexity of a model, and of an adapter on it, on the examples of a file.

Examples are read, rendered, tokenized and masked as for training, so that the numbers are those of training's
held-out loss. The account of the data and the table go to stdout, or with `--json` one object.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from jaxft.cli.command import add_model_options, base_of, check_adapter, exit_code, load_tokenizer, local, mesh_of
from jaxft.config import DatasetConfig
from jaxft.data.chat import Renderer
from jaxft.data.formats import FORMATS
from jaxft.data.prepare import prepare
from jaxft.data.tokenized import check_vocabulary
from jaxft.evaluation.loss import Score, score
from jaxft.hub.model_files import read_config
from jaxft.hub.peft import load_adapter
from jaxft.hub.resolve import resolve_model
from jaxft.models.hf_config import decoder_config
from jaxft.sharding import hosts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for bad input."""
    return exit_code(partial(_run, _parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Loss and perplexity of a model on a file of examples.")
    add_model_options(parser)
    add = parser.add_argument
    add("--data", required=True, type=local, metavar="FILE", help="examples, in any format that training reads")
    add("--type", choices=tuple(FORMATS), help="format of the examples (default: detect it)")
    add(
        "--columns",
        type=_columns,
        default={},
        metavar="NAME=COLUMN,...",
        help="what the file calls them, as in prompt=question,completion=answer",
    )
    add("--chat-template", type=local, metavar="NAME", help="chatml or a Jinja file, not the tokenizer's own")
    add(
        "--max-length",
        type=_positive,
        default=2048,
        metavar="N",
        help="drop longer ones (default: %(default)s)",
    )
    add("--all-tokens", action="store_true", help="every token counts, not only the assistant's")
    add(
        "--batch-size",
        type=_positive,
        default=8,
        metavar="N",
        help="examples per device (default: %(default)s)",
    )
    add("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _run(options: argparse.Namespace) -> None:
    mesh = mesh_of(options)
    resolved = resolve_model(options.model, options.revision)
    directory = resolved.path
    check_adapter(options.adapter)
    data = prepare(
        [DatasetConfig(path=options.data, type=options.type, columns=options.columns)],
        Renderer(load_tokenizer(directory, options.adapter), options.chat_template),
        max_length=options.max_length,
        assistant_only_loss=not options.all_tokens,
    )
    check_vocabulary(data.train, decoder_config(read_config(directory)).vocab_size)
    (examples,), (read,) = data.train, data.report.sources

    measure = partial(score, examples=examples, batch_size=options.batch_size, max_length=options.max_length, mesh=mesh)
    base = base_of(options, mesh, resolved)
    hosts.agree({"data": examples.fingerprint(), "weights": base.source.fingerprint})
    models = {"base": base}
    if options.adapter is not None:
        models["adapter"] = load_adapter(base, options.adapter)
    scores = {name: measure(model) for name, model in models.items()}

    if not hosts.is_writer():
        return
    if options.json:
        measured = {name: {**one._asdict(), "perplexity": one.perplexity} for name, one in scores.items()}
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        print(json.dumps({"settings": settings, "data": asdict(read), **measured}))
    else:
        print(read, _table(scores), sep="\n\n")


def _table(scores: dict[str, Score]) -> str:
    rows = [("", "loss", "perplexity", "tokens")]
    for name, one in scores.items():
        rows.append((name, f"{one.loss:.6f}", f"{one.perplexity:.4f}", str(one.tokens)))
    return "\n".join("{:8}{:>12}{:>14}{:>12}".format(*row) for row in rows)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more (got {text!r})")
    return int(text)


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    columns = {name.strip(): column.strip() for name, _, column in pairs}
    if len(columns) < len(pairs) or "" in {*columns, *columns.values()}:
        raise argparse.ArgumentTypeError(f"must look like prompt=question,completion=answer (got {text!r})")
    return columns
