"""`stepcache app`: a page in the browser; a prompt, a method and its budget, and both clips in lock-step."""

from __future__ import annotations

import argparse
import re
import socket

from stepcache.commands.flags import EMBEDDED, Flags, add_device_flags, check_embedded
from stepcache.commands.main import sentence
from stepcache.measure.device import find_device
from stepcache.measure.pipelines import model_defaults, model_inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `stepcache app`."""
    parser.description = __doc__
    flags = Flags(parser)
    flags.add(
        "--model",
        default=str(EMBEDDED),
        metavar="DIR_OR_ID",
        help="the model selected at first (default: the embedded model)",
    )
    flags.add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    flags.add("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    add_device_flags(flags)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked, then serve until Ctrl-C."""
    check_embedded(args.model)
    model_inputs(args.model)
    model_defaults(args.model)
    find_device(args.device)
    check_address(args.host, args.port)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page needs Gradio: pip install 'stepcache[app]' ({error}).") from error
    from stepcache.bench.app import Page, examples, serve
    from stepcache.bench.pairs import Maker

    prompts = examples(EMBEDDED) if args.model == str(EMBEDDED) else []
    serve(Page(Maker(args.device, args.dtype), args.model, prompts, in_words), args.host, args.port)
    return 0


def check_address(host: str, port: int | None) -> None:
    """OSError or ValueError with one sentence if nothing can be served there."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"--port is {port}; expected 1 to 65535.")
    try:
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        place = f"--host {host}" + (f" --port {port}" if port else "")
        raise OSError(f"{place} cannot be used ({error.strerror or error}); give another one.") from error


def in_words(error: Exception) -> str:
    """An error's sentence for a page, which has fields where the command line has flags."""
    return re.sub(r"(?<!\S)--", "", sentence(error)).replace("num-frames", "num_frames")
