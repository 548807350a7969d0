"""python -m moe: run a layer of a real model, time many, tune them, or say what is here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from moe.cli.arguments import make_parser
from moe.cli.machine import UnfitMachine


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a result is wrong, or a bucket could not be tuned; 2 for arguments that make no sense; 130 where
    the user stopped it."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    with torch.inference_mode():
        try:
            return options.command(options)
        except UnfitMachine as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
