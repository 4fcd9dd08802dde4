"""`python -m ldm COMMAND`: everything but training.

Commands are modules of ldm.app with SUMMARY, arguments(parser) and run(args) -> exit status or None. None of them imports
torch before its arguments are understood, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ldm.app import terminal
from ldm.common.files import OnAllRanks, nearest

COMMANDS = ("txt2img", "generate", "img2img", "inpaint", "upscale", "interpolate", "variations", "edit", "reconstruct",
            "evaluate", "check-autoencoder", "compare-autoencoders", "average", "cache", "convert", "data", "serve",
            "info")


class Parser(argparse.ArgumentParser):
    """Mistakes are told in one line, with what may have been meant."""

    def error(self, message: str) -> None:
        raise OnAllRanks(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Unknown options are told before missing ones: the one is often the other, misspelt."""
        for word in () if self._subparsers else args or ():
            option = word.split("=")[0]
            if option.startswith("--") and option != "--" and option not in self._option_string_actions:
                near = nearest(option, self._option_string_actions)
                self.error(f"no argument {option}{f'; nearest: {near}' if near else ''}")
        return super().parse_known_args(args, namespace)


def make_parser() -> Parser:
    parser = Parser(prog="python -m ldm", description="Latent diffusion: use what main.py has trained.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"ldm.app.{name.replace('-', '_')}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        command.add_argument("-v", "--verbose", action="store_true", help="show where an error came from")
        module.arguments(command)
        command.set_defaults(run=module.run, shared=getattr(module, "SHARED", False))
    return parser


def rank() -> int:
    """Of this process among those that torchrun or srun started."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def together(args: argparse.Namespace) -> int:
    """One of several processes (torchrun, srun): each does its share, or rank 0 all of it where the command knows no shares."""
    from ldm.app import launch

    if not args.shared:
        return 0 if launch.rank() else args.run(args) or 0
    with launch.team():
        try:
            return args.run(args) or 0
        except (ValueError, OSError, KeyboardInterrupt):
            raise
        except Exception:
            launch.fail()


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status: 0, what a command says itself (1: a check that failed), 2 for a mistake in what was given, 130 when
    interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            near = nearest(arguments[0], COMMANDS)
            hint = f"; nearest: {near}" if near else ""
            raise OnAllRanks(f"no command {arguments[0]!r}{hint}; there are {', '.join(COMMANDS)}")
        args = make_parser().parse_args(arguments)
        if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
            return together(args)
        return args.run(args) or 0
    except BrokenPipeError:  # `info ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:  # ValueError: what people gave; OSError: no space, no permission
        if {"-v", "--verbose"} & set(arguments):
            logging.getLogger("ldm").exception("")
        if rank() == 0 or not isinstance(error, OnAllRanks):
            terminal.report(" ".join(str(error).split()) or type(error).__name__)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    terminal.set_up(rank())
    sys.exit(main())
