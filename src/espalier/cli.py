"""The command line: reads the arguments, runs a command, and ends with one line and an exit code where it fails."""

import errno
import os
import sys
from typing import Annotated

import typer

from espalier.commands import pipeline, results, stages
from espalier.commands.app import app
from espalier.errors import InterruptedWork, UserError, out_of_memory

PANELS = (pipeline, results, stages)  # each has added its commands to the app


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 2 and one line for a user's mistake, 130 for an interrupt.

    128 plus the signal's number, and one line, where a stage saved its state before it ended.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; a log gets lines
    try:
        app(arguments, prog_name="espalier")
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}no space left on the disk. Free some space or write elsewhere, then run again.")
    except (MemoryError, RuntimeError) as error:
        if debug or not out_of_memory(error):
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        _fail(
            f"out of memory ({what}). Lower runtime.collect_batch_size or runtime.score_batch_size (`--batch-size` of "
            "compress), set runtime.stream=always (`--stream always`), or take more memory; then run again."
        )
    except InterruptedWork as stopped:
        print(f"espalier: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print("espalier: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        from espalier import __version__

        print(f"espalier {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Make large language models sparse, and measure what each step cost and saved."""
