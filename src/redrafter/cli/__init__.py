"""The command line.  One thin file per command; heavy imports happen inside them, so that `--help` is quick."""

from __future__ import annotations

import atexit
import codecs
import errno
import io
import logging
import os
import re
import sys
from typing import Any, NoReturn

import typer

from redrafter import __version__
from redrafter.cli.bench import bench, sweep
from redrafter.cli.check import check
from redrafter.cli.data import data
from redrafter.cli.demo import demo
from redrafter.cli.distill import distill
from redrafter.cli.eval import evaluate
from redrafter.cli.export import export
from redrafter.cli.generate import generate
from redrafter.cli.info import info
from redrafter.cli.profile import profile
from redrafter.cli.train import train
from redrafter.cli.tune import tune
from redrafter.errors import RedrafterError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact, fast speculative decoding with a recurrent drafter: the model's own text, sooner. "
    "Start with `redrafter demo`.",
)
for command in (demo, generate, distill, train, data, check, profile, tune, bench, sweep, info, export):
    app.command()(command)
app.command("eval")(evaluate)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"redrafter {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; may stand anywhere."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Say which version it is."),
) -> None:
    """Options of all commands."""


def _misspelt(error: Exception) -> str | None:
    """What typer says of words that are no command of ours; its errors are click's, or of a copy that it brings."""
    usage_error: Any = typer.BadParameter.__mro__[1]
    if not isinstance(error, usage_error):
        return None
    command = error.ctx.command_path if error.ctx else "redrafter"
    return f"{error.format_message().rstrip('.')}; see {command} --help."


def _in_flags(sentence: str, words: list[str]) -> str:
    """The library's names of arguments, such as do_sample, as the flags of the running command, such as --do-sample.

    Names that the user wrote stay as they are.
    """
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
    running = next((commands[word] for word in words if word in commands), None)
    for option in running.params if running else ():
        if "_" in option.name and option.opts[0].startswith("--") and not any(option.name in word for word in words):
            sentence = re.sub(rf"(?<![\w/.-]){option.name}(?![\w=/]|\.\w)", option.opts[0], sentence)
    return sentence


def _end(status: int) -> NoReturn:
    """Ends the process; one that is in a group of torch.distributed without the end of the interpreter.

    Gloo's threads may still hold tensors then, and before Python 3.14 abort the process when they let go of them
    (https://github.com/pytorch/pytorch/issues/190489).  `destroy_process_group` joins them only where nothing else
    knows the group; torch's caches know that of a target divided by `fully_shard`.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(status)
    if status == 0:  # after a fault the others may wait in vain
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that a stream cannot encode: JSON's escapes, so that lines of JSON stay JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


def _print_anything() -> None:
    """Lets no character stop a command that has its results: streams escape what their encoding lacks."""
    codecs.register_error("redrafter.escape", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="redrafter.escape")


def _silence_torchao() -> None:
    """Leaves out what torchao logs wherever it is installed for another version of torch; we use none of that."""
    logging.getLogger("torchao").addFilter(lambda record: "Failed to load" not in record.getMessage())
    told = "is an Enum subclass and is now natively supported"
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: told not in record.getMessage())


def main(arguments: list[str] | None = None) -> None:
    """Runs a command: exit status 0, 1 for a failed check, 2 for bad input, which is said in one sentence.

    A run that Ctrl-C or SIGTERM stops has exit status 130 or 143.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    _print_anything()
    _silence_torchao()
    failed = 2
    try:
        told = [word for word in words if word != "--debug"] or ["--help"]
        status = app(told, prog_name="redrafter", standalone_mode=False)
        if status != 130:  # what typer makes of an interrupt
            _end(status or 0)
        sentence, failed = "Interrupted.", 130
    except RedrafterError as error:
        sentence, failed = _in_flags(str(error), words), getattr(error, "status", 2)
        if debug:
            raise
    except OSError as error:
        if debug:
            raise
        reason = "no space is left on the device" if error.errno == errno.ENOSPC else error.strerror or str(error)
        sentence = f"Reading or writing {error.filename or 'a file'} failed: {reason}."
    except Exception as error:  # what nobody foresaw is told in one sentence too; --debug shows where it was raised
        if debug:
            raise
        sentence = _misspelt(error) or f"{type(error).__name__}: {str(error).rstrip('.')}; add --debug to see where."
    print(f"redrafter: {' '.join(sentence.split())}", file=sys.stderr)
    _end(failed)
