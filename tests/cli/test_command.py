"""What the commands share."""

import pytest

from jaxft.cli import evaluate, export, generate

PARSERS = {
    "generate": (generate._parser, {"--model": "model", "--adapter": "adapter", "--chat-template": "chat_template"}),
    "evaluate": (evaluate._parser, {"--model": "model", "--adapter": "adapter", "--data": "data"}),
    "export": (export._parser, {"--run": "run", "--output": "output"}),
}
REQUIRED = {
    "generate": ["--model=m", "--prompt=p"],
    "evaluate": ["--model=m", "--data=d"],
    "export": ["--run=r", "--output=o", "--format=peft"],
}


@pytest.mark.parametrize(
    "command, option", [(name, option) for name, (_, options) in PARSERS.items() for option in options]
)
def test_home_and_addresses_in_options(monkeypatch, capsys, command, option):
    monkeypatch.setenv("HOME", "/home/me")
    parser, options = PARSERS[command]
    parsed = parser().parse_args([*REQUIRED[command], f"{option}=~/x"])
    assert str(getattr(parsed, options[option])) == "/home/me/x"
    with pytest.raises(SystemExit) as left:
        parser().parse_args([*REQUIRED[command], option, "gs://bucket/x"])
    assert left.value.code == 2
    assert f"{option}: is an address (gs://)" in capsys.readouterr().err
