"""python -m moe: run a layer of a real model, time many, tune them, or say what is here."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import torch

from moe.cli.arguments import make_parser
from moe.cli.machine import UnfitMachine


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a result is wrong or cannot be printed, or a bucket could not be tuned; 2 for arguments that make no sense; 130 where
    the user stopped it."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    with torch.inference_mode():
        try:
            status = options.command(options)
            sys.stdout.flush()
            return status
        except UnfitMachine as error:
            parser.error(str(error))
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            _leave_stdout()
            if error.errno != errno.EPIPE:  # where whoever reads has read enough
                print(f"stdout: expected a place for the result, got {error.strerror}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130


def _leave_stdout() -> None:
    """Drop what was not written, so that Python does not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
