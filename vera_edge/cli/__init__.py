"""The command line: the only place that imports click, and the only one that prints.

A command parses its words, calls the library and shows what it gives. Commands are loaded when they are
called, so that `vera-edge --help` stays quick.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import click

from vera_edge import __version__, printable
from vera_edge.cli.old_spellings import respelled
from vera_edge.cores import bound_libraries
from vera_edge.errors import BundleWarning, VeraEdgeError

# name -> (module:attribute, what it does), in the order a newcomer meets them
COMMANDS: dict[str, tuple[str, str]] = {
    "quantize": (
        "vera_edge.cli.quantize:quantize",
        "Write the quantized base of a training run, from the float one.",
    ),
    "inspect": ("vera_edge.cli.inspect:inspect", "Say what an adapter is, and whether it fits a base."),
    "projections": ("vera_edge.cli.projections:projections", "Regenerate and verify the shared projections."),
    "adapt": ("vera_edge.cli.adapt:adapt", "Carry an adapter to the form of its base that is shipped."),
    "plan": ("vera_edge.cli.plan:plan", "Choose formats that lose least within a size, or take least."),
    "merge": ("vera_edge.cli.merge:merge", "Merge an adapter into its base, as a Hugging Face folder."),
    "export": ("vera_edge.cli.export:export", "Export base and adapter to ONNX, merged or as a side-branch."),
    "drift": ("vera_edge.cli.drift:drift", "Measure how far an artefact is from the model as trained."),
    "run": ("vera_edge.cli.run:run", "Generate text from an exported folder, without torch."),
    "chat": ("vera_edge.cli.chat:chat", "Talk with an exported model in the terminal."),
    "serve": ("vera_edge.cli.serve:serve", "Answer OpenAI's protocol over HTTP, an adapter per model name."),
    "verify": ("vera_edge.cli.verify:verify", "Check every file of a bundle against its manifest."),
    "sign": ("vera_edge.cli.sign:sign", "Sign a bundle."),
    "install": ("vera_edge.cli.install:install", "Install a bundle on this device, atomically."),
    "update": ("vera_edge.cli.install:update", "Update an installed bundle by the files that changed."),
    "rollback": ("vera_edge.cli.install:rollback", "Go back to the version before."),
    "patch": ("vera_edge.cli.install:patch", "Write what takes a device from one bundle to another."),
    "golden": ("vera_edge.cli.golden:golden", "Put the reference's answers into a bundle, to validate by."),
    "validate": ("vera_edge.cli.validate:validate", "Hold a bundle to its limits on this device."),
    "bench": ("vera_edge.cli.bench:bench", "Measure speed and memory of a bundle on this device."),
    "adapter": (
        "vera_edge.cli.adapter:adapter",
        "Pack, list, compare and combine adapters; write one as LoRA.",
    ),
    "fetch": ("vera_edge.cli.fetch:fetch", "Bring a bundle over a slow link, only what is missing here."),
    "diff": ("vera_edge.cli.fetch:diff", "Say what changed from one bundle to another."),
    "release": ("vera_edge.cli.release:release", "Make every bundle of a recipe: gated, described, signed."),
    "doctor": ("vera_edge.cli.doctor:doctor", "Say what is installed and what this machine can do."),
    "completion": ("vera_edge.cli.completion:completion", "Print what a shell reads to complete commands."),
}

# what the device part does without -> the extra that brings it
EXTRAS = {
    "bitsandbytes": "build",
    "cyclonedx": "release",
    "filelock": "release",
    "gguf": "build",
    "h11": "serve",
    "llama_cpp": "llama",
    "matplotlib": "report",
    "model_signing": "release",
    "numba": "build",
    "onnx": "build",
    "onnx_ir": "build",
    "onnxruntime_genai": "build",
    "optimum": "build",
    "peft": "build",
    "pydantic": "release",
    "ray": "ray",
    "sentencepiece": "build",
    "sigstore": "release",
    "starlette": "serve",
    "threadpoolctl": "build",
    "torch": "build",
    "transformers": "build",
    "uvicorn": "serve",
}

# What a system says no with, wherever a path is looked at. Others, such as a missing file that a command
# counts on, would be a bug.
_REFUSALS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    }
)


class LazyGroup(click.Group):
    """A click group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        ctx.invoked_subcommand = args[0]  # known before its module is imported, which may lack a package
        name, command, words = super().resolve_command(ctx, args)
        words, notes = respelled(words)
        for note in notes:
            _tell(f"note: {note}")
        return name, command, words

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _refusals_told():  # --help and --version are written here
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        bound_libraries()  # before a command's module imports numpy or torch
        try:
            with _refusals_told(), _warnings_told():
                result = super().invoke(ctx)
                sys.stdout.flush()  # at the process's end it would be too late to say what fails
                return result
        except VeraEdgeError as error:
            _tell(error)
            sys.exit(error.exit_code)
        except MemoryError:
            _end_without_memory()
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in EXTRAS:
                raise
            hint = f"pip install 'vera-edge[{EXTRAS[missing]}]'"
            asked = ctx.invoked_subcommand or "this command"
            _tell(f"{asked} needs the package {missing}, which isn't installed: {hint}")
            sys.exit(VeraEdgeError.exit_code)
        except ImportError as error:
            if not any(words in str(error) for words in ("failed to map segment", "bad_alloc")):
                raise
            _end_without_memory()  # not even a shared library found room


def _tell(sentence: object) -> None:
    """The one place that errors and warnings are printed: in one line, whatever a file's names hold."""
    click.echo(f"vera-edge: {printable.line(sentence)}", err=True)


@contextlib.contextmanager
def _refusals_told() -> Iterator[None]:
    """End the process with one sentence where the system says no."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        # A file that the command writes is named by a VeraEdgeError; without a name it's where this process's
        # own output goes.
        what = error.filename or "the standard output"
        if error.filename is None:
            _drop_output()
        _tell(f"the system refuses {what}: {error.strerror}")
        sys.exit(VeraEdgeError.exit_code)


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Print our own warnings as one sentence each, others as Python does."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, BundleWarning):
                _tell(message)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _drop_output() -> None:
    """Let the interpreter flush what can't be written into nothing, or it would fail once more as it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end_without_memory() -> NoReturn:
    _tell("memory ran out; free some, or give this process more")
    sys.exit(VeraEdgeError.exit_code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="vera-edge", prog_name="vera-edge")
def main() -> None:
    """Put a VeRA, LoRA or other PEFT adapter, and the quantized model it was trained on, onto a small device.

    Exit codes: 0 done, 2 the input or the request is at fault (one sentence says how), 3 a limit was broken
    or can't be decided, or a check failed.
    """
