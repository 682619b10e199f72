"""The command line.  One module per command; heavy libraries are imported inside functions, so `--help` is fast."""

from __future__ import annotations

import atexit
import codecs
import errno
import io
import logging
import os
import pkgutil
import re
import sys
from functools import cache, partial
from importlib import import_module
from typing import Any, NoReturn

import typer

from redrafter.cli.app import PANELS, app
from redrafter.errors import RedrafterError

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)
app.registered_commands.sort(key=lambda one: PANELS.index(str(one.rich_help_panel)))


def _usage_error(error: Exception) -> str | None:
    """The message of an error in the command line's syntax, with advice; None for any other error.

    typer raises errors of click, or of a copy of click that it contains.
    """
    usage_error: Any = typer.BadParameter.__mro__[1]
    if not isinstance(error, usage_error):
        return None
    command = error.ctx.command_path if error.ctx else "redrafter"
    message = error.format_message().rstrip(".").replace("Value error, ", "")  # which some versions of typer add
    return f"{message}; see {command} --help."


@cache
def _command() -> Any:
    """The command line with all commands, which takes tens of milliseconds to build."""
    return typer.main.get_command(app)


def _with_flags(message: str, words: list[str]) -> str:
    """Replaces names of the library's arguments, such as do_sample, by the command's flags, such as --do-sample.

    Names that the user typed are left alone.
    """
    commands: dict[str, Any] = getattr(_command(), "commands", {})
    running = next((commands[word] for word in words if word in commands), None)
    for option in running.params if running else ():
        if "_" in option.name and option.opts[0].startswith("--") and not any(option.name in word for word in words):
            message = re.sub(rf"(?<![\w/.-]){option.name}(?![\w=/]|\.\w)", option.opts[0], message)
    return message


def _exit(status: int) -> NoReturn:
    """Ends the process.  In a process group of torch.distributed, skips the interpreter's own shutdown.

    Gloo's threads may still hold tensors then, and before Python 3.14 they abort the process when they release them
    (https://github.com/pytorch/pytorch/issues/190489).  `destroy_process_group` joins them only if nothing else refers
    to the group; torch's caches refer to the group of a target sharded by `fully_shard`.
    """
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(status)
    if status == 0:  # after an error the other processes may never join
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _escape(error: UnicodeError) -> tuple[str, int]:
    """JSON escapes for characters that a stream cannot encode, so that lines of JSON stay valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


def _escape_unencodable_output() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks, instead of raising an error."""
    codecs.register_error("redrafter.escape", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="redrafter.escape")


def _lacks(message: str, record: logging.LogRecord) -> bool:
    return message not in record.getMessage()


def _silence_torchao() -> None:
    """Hides what torchao logs if it was built for another version of torch; the package does not use that part."""
    messages = {
        "torchao": "Failed to load",
        "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    }
    for name, message in messages.items():
        logging.getLogger(name).addFilter(partial(_lacks, message))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command.

    Exit status: 0; 1 for a failed check; 2 for an error, which is printed as one sentence; 130 or 143 after Ctrl-C or
    SIGTERM.
    """
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    _escape_unencodable_output()
    _silence_torchao()
    failed = 2
    try:
        rest = [word for word in words if word != "--debug"] or ["--help"]
        status = _command()(rest, prog_name="redrafter", standalone_mode=False)
        if status != 130:  # typer's status for an interrupt
            _exit(status or 0)
        message, failed = "Interrupted.", 130
    except RedrafterError as error:
        message, failed = _with_flags(str(error), words), getattr(error, "status", 2)
        if debug:
            raise
    except OSError as error:
        if debug:
            raise
        reason = "no space is left on the device" if error.errno == errno.ENOSPC else error.strerror or str(error)
        message = f"Reading or writing {error.filename or 'a file'} failed: {reason}."
    except Exception as error:  # an error of the package itself
        if debug:
            raise
        message = _usage_error(error) or f"{type(error).__name__}: {str(error).rstrip('.')}; add --debug to see where."
    print(f"redrafter: {' '.join(message.split())}", file=sys.stderr)
    _exit(failed)
