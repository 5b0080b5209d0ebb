"""`vera-edge serve`: a bundle behind OpenAI's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    fast_option,
    four_bit_option,
    huge_pages_option,
    prompt_cache_option,
    reread_option,
    resident_option,
    tell,
)
from vera_edge.cli.trust import takes_trust


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; others than loopback need a key."
)
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--name", help="The model name of what BUNDLE runs by itself; its folder's name by default.")
@click.option(
    "--api-key",
    envvar="VERA_EDGE_API_KEY",
    help="What clients must send. Others on this machine see a command's words; give the variable "
    "VERA_EDGE_API_KEY, or a file.",
)
@click.option("--api-key-file", type=FOLDER, metavar="FILE", help="A file with the key in one line.")
@click.option("--rows", default=8, show_default=True, help="Texts that are generated together, at most.")
@click.option("--queue", default=32, show_default=True, help="Requests that may wait; more get a 429.")
@click.option(
    "--context", type=int, help="Tokens of a prompt and its answer; the model's, 4096 at most, by default."
)
@click.option("--timeout", default=600.0, show_default=True, help="Seconds that a request may take in all.")
@click.option("--max-body", default="4MB", show_default=True, metavar="SIZE", help="Bytes of a request.")
@click.option(
    "--varying",
    is_flag=True,
    help="Let an answer's last digits depend on how many run beside it; quicker for one at a time.",
)
@click.option(
    "--adapters-from",
    type=FOLDER,
    metavar="FOLDER",
    help="Let clients add adapters that lie in FOLDER, and remove them.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads per operator; all cores by default.")
@fast_option
@reread_option
@prompt_cache_option
@four_bit_option
@resident_option
@huge_pages_option
@takes_trust
def serve(bundle: Path, **options: Any) -> None:
    """Answer OpenAI's protocol over HTTP for BUNDLE: each of its adapters is a model's name, and so is base.

    /v1/chat/completions, /v1/completions, /v1/models, /v1/adapters; for encoders /v1/embeddings. Ctrl-C ends
    it.
    """
    vera_edge.serve(bundle, tell=tell, **options)
