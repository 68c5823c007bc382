"""Flags of the subcommands: the modes in which each has an effect, and what several subcommands share.

A flag that would be ignored is an error. So a flag that does not always act is declared with what it needs, and the
subcommand says which of these hold for the flags at hand:

    flags = Flags(parser, modes=lambda args: {f"--objective {args.objective}"})
    flags.add("--objective", choices=("sum", "power"), default="sum")
    flags.add("--gamma", type=float, default=2.0, needs="--objective power")
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from stepcache.fleet.cluster import LOCAL, Resources
from stepcache.measure.generation import Request, check_request, requested
from stepcache.measure.pipelines import model_inputs

_HERE = Path(__file__).resolve()
_PLACES = [folder / "assets" / "tiny-wan" for folder in (_HERE.parents[1], _HERE.parents[3])]  # of a wheel, of a clone
EMBEDDED = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
"""The small video model that comes with the package."""
SIZES = ("height", "width", "num_frames")


Modes = Callable[[argparse.Namespace], Collection[str]]
"""What holds for a command's flags, in the words of the `needs` of its flags."""


class Flags:
    """The flags of one subcommand.

    Args:
        parser: of the subcommand.
        modes: which of the conditions hold that flags `need`.
    """

    def __init__(self, parser: argparse.ArgumentParser, modes: Modes = lambda args: ()) -> None:
        self._parser, self._modes = parser, modes
        self._defaults: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._needs: dict[str, tuple[str, ...]] = {}
        self._wanted: list[str] = []
        parser.set_defaults(flags=self)

    def add(
        self, name: str, *, default: Any = None, needs: str | Sequence[str] = (), group: Any = None, **options: Any
    ) -> None:
        """Declare a flag, with argparse's options.

        Args:
            name: of the flag, or of a positional argument; underscores of a flag become hyphens.
            default: its value when it is not given.
            needs: it has an effect only where one of these holds; nothing: always.
            group: an argument group of the parser to put it into.
            **options: argparse's.
        """
        name = name.replace("_", "-") if name.startswith("-") else name
        said = options.get("help", "")
        if default not in (None, False, "") and "default" not in said and not said.endswith(")"):
            options["help"] = f"{said} ({default})".lstrip()
        if options.get("required") or not name.startswith("-"):
            self._wanted.append(
                f"{name} {options.get('metavar', '')}".strip() if name[0] == "-" else _shown(name, options)
            )
            self._parser.usage = f"{self._parser.prog} {' '.join(self._wanted)} [flags]"
        action = (group or self._parser).add_argument(name, default=argparse.SUPPRESS, **options)
        self._defaults[action.dest], self._names[action.dest] = default, name
        self._needs[action.dest] = (needs,) if isinstance(needs, str) else tuple(needs)

    def group(self, title: str) -> Any:
        """A group of the help text, for `add`."""
        return self._parser.add_argument_group(title)

    def add_gone(self, names: dict[str, str]) -> None:
        """Flags of earlier versions and their replacements: using one is an error that names the replacement."""
        for name, now in names.items():
            self._parser.add_argument(name, nargs="?", action=_Gone, now=now, help=argparse.SUPPRESS)

    def completed(self, given: argparse.Namespace) -> argparse.Namespace:
        """What was given, and defaults for the rest.

        Raises:
            ValueError: a flag was given that has no effect beside the others.
        """
        mine = {name: value for name, value in vars(given).items() if name in self._defaults}
        args = argparse.Namespace(**{**self._defaults, **mine})
        holding = set(self._modes(args))
        for name in mine:
            if (needs := self._needs[name]) and not holding.intersection(needs):
                raise ValueError(f"{self._names[name]} has no effect here; it needs {' or '.join(needs)}.")
        return args


def _shown(name: str, options: dict[str, Any]) -> str:
    """A positional argument in the usage line."""
    shown = str(options.get("metavar", name.upper()))
    return f"[{shown}]" if options.get("nargs") == "?" else shown


class _Gone(argparse.Action):
    """Ends the parser with how a flag of an earlier version is written now."""

    def __init__(self, option_strings: Sequence[str], dest: str, now: str, **options: Any) -> None:
        super().__init__(option_strings, dest, **{**options, "default": argparse.SUPPRESS})
        self.now = now

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.error(f"{option_string} is no longer a flag: {self.now}")


def add_request_flags(flags: Flags, **options: Any) -> None:
    """What all uncached runs have in common: `request_from` reads it."""
    group = flags.group("sampling")
    flags.add("--negative_prompt", default="", metavar="TEXT", group=group, help="what to avoid (none)", **options)
    flags.add(
        "--steps",
        type=int,
        metavar="N",
        group=group,
        help="steps of the denoising loop (default: the model's, else 50)",
        **options,
    )
    flags.add(
        "--guidance",
        type=float,
        metavar="SCALE",
        group=group,
        help="guidance scale; 1 is off (default: the model's)",
        **options,
    )
    add_size_flags(flags, "default: the model's", group=group, **options)


def add_size_flags(flags: Flags, help_text: str, **options: Any) -> None:
    """Height and width in pixels, and frames."""
    for name in SIZES:
        kind = "of a clip" if name == "num_frames" else "in pixels"
        flags.add(f"--{name}", type=int, metavar="N", help=f"{kind} ({help_text})", **options)


def add_device_flags(flags: Flags, group: Any = None, **options: Any) -> None:
    """Where and in which precision the model runs."""
    precisions = ("float32", "bfloat16", "float16")
    group = group or flags.group("device")
    flags.add("--device", metavar="DEV", group=group, help="default: cuda if there is one, else cpu", **options)
    flags.add("--dtype", choices=precisions, group=group, help="default: bfloat16 on cuda, float32 on cpu", **options)


def request_from(args: argparse.Namespace, prompt: str | None = None, seed: int = 0, image: bool = False) -> Request:
    """What the flags ask for; steps, guidance and sizes default to the model's.

    Args:
        args: `model`, and flags of `add_request_flags`; those that a command does not have count as not given.
        prompt: None where prompts come from a file.
        seed: of the run.
        image: whether a picture is given.

    Raises:
        ValueError: numbers the pipeline cannot use, an empty prompt, or a model that makes nothing from a text.
        FileNotFoundError: no such model.
    """
    if prompt is not None and not prompt.strip():
        raise ValueError("--prompt is empty; say what to generate.")
    inputs, names = (
        model_inputs(args.model, image),
        ("negative_prompt", "steps", "guidance", "max_sequence_length", *SIZES),
    )
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    request = requested(args.model, prompt or "", seed=seed, **given)
    check_request(request, inputs)
    return request


def check_embedded(model: str) -> None:
    """FileNotFoundError if the embedded model is meant and this installation lacks it."""
    if model == str(EMBEDDED) and not EMBEDDED.is_dir():
        raise FileNotFoundError(
            "the embedded model (assets/tiny-wan) is missing from this installation; give --model DIR."
        )


def add_ray_flags(flags: Flags, **options: Any) -> None:
    """The flags that put work on a cluster: `resources_from` reads them."""
    group = flags.group("on a Ray cluster (pip install 'stepcache[cluster]')")
    flags.add(
        "--ray",
        nargs="?",
        const=LOCAL,
        group=group,
        metavar="ADDRESS",
        help="run on Ray: host:port of a cluster, auto for this machine's cluster, no address for this machine alone",
        **options,
    )
    numbers: tuple[tuple[str, type, Any, str], ...] = (
        ("--workers", int, None, "processes that load the model (default: as many as fit)"),
        ("--cpus-per-worker", float, 1.0, "CPU cores of each (1)"),
        ("--gpus-per-worker", float, None, "GPUs of each, such as 0.5 (default: 1 if there are any)"),
        ("--max-retries", int, 3, "how often a lost job is started again (3)"),
    )
    for name, kind, default, text in numbers:
        flags.add(name, type=kind, default=default, group=group, metavar="N", needs="--ray", help=text)


def resources_from(args: argparse.Namespace) -> Resources | None:
    """What is asked of Ray; None if nothing is. ValueError for impossible numbers."""
    if args.ray is None:
        return None
    return Resources(args.ray, args.workers, args.cpus_per_worker, args.gpus_per_worker, args.max_retries)


def absolute(path: str | None) -> str | None:
    """A path as workers can use it, who run in other folders: absolute where it is here, else (a hub id) as it is."""
    if path and (found := Path(path).expanduser()).exists():
        return str(found.absolute())
    return path
