"""Child processes that start with the libraries loaded, forked from one server."""

import multiprocessing
import os
from multiprocessing import forkserver

PRELOAD = [
    "espalier.cli",
    "espalier.collecting.collect",
    "espalier.surgery.apply",
    "espalier.oneshot",
    "espalier.scoring.score",
    "espalier.stages",
    "espalier.inputs.tokens",
    "transformers.models.mixtral.modeling_mixtral",
]


def context():
    """Return the multiprocessing context in which children start."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # read when the libraries are imported; the command line sets it before
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before
    return found


def command(arguments, folder, **environment):
    """Run the command line in a child and return its exit code, output and errors, which pass through `folder`."""
    out, err = folder / "stdout", folder / "stderr"
    child = context().Process(target=_command, args=(list(map(str, arguments)), out, err, environment))
    child.start()
    child.join()
    return child.exitcode, out.read_text(), err.read_text()


def _command(arguments, out, err, environment):
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ |= environment
    import torch

    from espalier import cli

    torch.set_num_threads(1)
    cli.main(arguments)
