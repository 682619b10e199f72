"""Output reaches streams of every encoding, and errors about paths come before heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from redrafter import cli

@cli.app.command("words")
def words(text: str):
    import typer
    from rich.console import Console
    typer.echo(json.dumps({"text": json.loads(text)}, ensure_ascii=False))
    Console().print(json.loads(text))
    typer.echo(json.loads(text), err=True)

cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16", "shift-jis", "cp1252:strict"])
def test_characters_that_a_stream_cannot_encode_are_escaped(encoding):
    text = "caf\u00e9 \u6f22 \N{GRINNING FACE} \ud800"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", SCRIPT, "words", json.dumps(text)]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    if encoding != "ascii":  # for which typer writes UTF-8
        line = done.stdout.decode(encoding.partition(":")[0]).splitlines()[0]
        assert json.loads(line) == {"text": text}


GENERATE = """
import sys
from redrafter.cli import main
try:
    main()
finally:
    from transformers import AutoModelForCausalLM
    from redrafter import RecurrentDrafter, stream
    model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
    events = stream(model, RecurrentDrafter.from_pretrained(sys.argv[5]), [[5, 9]], max_new_tokens=30)
    next(events)
    print("redrafter.kernels.triton" in sys.modules)
"""


def test_a_process_of_its_own_in_a_c_locale(model_folder, drafter_folder, tmp_path):
    """Text is escaped; without a GPU triton is not imported; a stream that is open when Python ends prints nothing."""
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "cp1252",
    }
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "\u6f22"}', encoding="utf-8")
    words = ["generate", "--model", model_folder, "--drafter", drafter_folder, "--prompts", prompts, "--json"]
    command = [sys.executable, "-c", GENERATE, *words, "--max-new-tokens", 3]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    answer, triton = done.stdout.decode("cp1252").splitlines()
    assert json.loads(answer)["prompt"] == "\u6f22"
    assert triton == "False"
    assert b"Failed to load" not in done.stderr
    assert b"Enum subclass" not in done.stderr
    assert b"Exception" not in done.stderr
    assert b"Traceback" not in done.stderr


HEAVY = """
import contextlib, io, json, sys
from redrafter.cli import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(json.loads(line))
        except SystemExit as end:
            status = end.code
    loaded = sorted({"torch", "transformers", "huggingface_hub"} & sys.modules.keys())
    print(json.dumps([status, out.getvalue(), err.getvalue(), loaded]))
"""
COMMANDS = (
    "generate --model MODEL --no-drafter --prompt x",
    "generate --model here --drafter DRAFTER --prompt x",
    "check --model MODEL --drafter x --prompts x",
    "check --model here --drafter DRAFTER --prompts x",
    "eval --model MODEL --drafter x --prompts x",
    "eval --model here --drafter DRAFTER --prompts x",
    "distill --model MODEL --prompts x --output new.jsonl",
    "distill --model here --drafter DRAFTER --prompts x --output new.jsonl",
    "train --model MODEL --data x --output new",
    "data x --model MODEL",
    "profile --model MODEL",
    "tune --model MODEL --drafter x --prompts x",
    "tune --model here --drafter DRAFTER --prompts x",
    "serve --model MODEL",
    "serve --model here --drafter DRAFTER",
    "info --model MODEL",
    "info DRAFTER",
    "export DRAFTER --output new",
)


def test_a_missing_folder_is_reported_before_anything_is_loaded(tmp_path):
    """By all commands in one process: what one loads stays loaded."""
    (tmp_path / "here").mkdir()
    missing = str(tmp_path / "none")
    lines = [json.dumps(words.replace("MODEL", missing).replace("DRAFTER", missing).split()) for words in COMMANDS]
    program = [sys.executable, "-c", HEAVY]
    done = subprocess.run(program, input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True, check=True)
    for words, line in zip(COMMANDS, done.stdout.splitlines(), strict=True):
        kind = "model" if "MODEL" in words else "drafter"
        sentence = f"redrafter: There is no {kind} folder at {missing}.\n"
        assert json.loads(line) == [2, "", sentence, []], words
    assert os.listdir(tmp_path) == ["here"]
