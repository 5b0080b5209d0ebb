"""`vera-edge adapter`: pack, list, compare adapters, and write one as LoRA."""

from __future__ import annotations

from pathlib import Path

import click

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    force_option,
    json_option,
    note,
    out,
    print_json,
    projection_rounding_option,
    trained_as_option,
)


@click.group()
def adapter() -> None:
    """Adapters on their own: kilobytes that an exported base takes in milliseconds."""


@adapter.command()
@click.argument("adapter", type=FOLDER)
@click.option("--for", "bundle", type=FOLDER, required=True, help="The branch bundle that will run it.")
@click.option("-o", "--out", "output", type=FOLDER, required=True, help="The .onnx_adapter to write.")
@click.option("--weight", type=float, default=1.0, show_default=True, help="Scales the adapter's delta.")
@force_option
@json_option
def pack(adapter: Path, bundle: Path, output: Path, weight: float, force: bool, as_json: bool) -> None:
    """Pack the PEFT folder ADAPTER for a bundle that was exported with --mode branch.

    In float32 or float16, as the bundle was exported (--vectors).
    Refused when rank, seed, projections, layers or shapes aren't the bundle's: ONNX Runtime would run such a
    file without a word.
    """
    packed = vera_edge.pack_adapter(adapter, bundle, out=output, weight=weight, force=force)
    if as_json:
        print_json(packed.to_dict())
    else:
        out().print(f"{packed.path}: {packed.size / 1e3:.1f} KB, for {bundle}")


@adapter.command()
@click.argument("adapter")
@click.option("--for", "bundle", type=FOLDER, required=True, help="The branch bundle to add the graph to.")
@click.option("--name", help="model_NAME.onnx is written.  [default: the adapter's name]")
@force_option
@json_option
def freeze(adapter: str, bundle: Path, name: str | None, force: bool, as_json: bool) -> None:
    """Add a graph to a branch bundle that has ADAPTER built in, for runtimes that swap no adapters.

    ADAPTER is a name of the bundle or an .onnx_adapter file. The weights are shared with the bundle's own
    graph. Transformers.js opens it by its model_file_name, Optimum by its file_name. Freeze before signing.
    """
    made = vera_edge.freeze_adapter(adapter, bundle, name=name, force=force)
    if as_json:
        print_json(made.to_dict())
    else:
        out().print(f"{made.path}: {made.size / 1e3:.1f} KB, beside the weights of {bundle}")


@adapter.command("list")
@click.argument("bundle", type=FOLDER)
@json_option
def list_adapters(bundle: Path, as_json: bool) -> None:
    """List the adapters of BUNDLE; the default one is marked."""
    manifest = vera_edge.read_manifest(bundle)
    if as_json:
        print_json({"adapters": dict(manifest.adapters), "default": manifest.default_adapter})
        return
    for name, entry in manifest.adapters.items():
        mark = "*" if name == manifest.default_adapter else " "
        where = entry["file"] or "merged into the weights"
        out().print(f"{mark} {name}  {where}  {entry['digest'][:12]}")


@adapter.command()
@click.argument("old", type=FOLDER)
@click.argument("new", type=FOLDER)
@json_option
def diff(old: Path, new: Path, as_json: bool) -> None:
    """Compare two PEFT adapters: what differs, and by how much, layer by layer."""
    found = vera_edge.diff_adapters(old, new)
    if as_json:
        print_json(found.to_dict())
        return
    for line in found.lines():
        out().print(line)


@adapter.command("to-lora")
@click.argument("adapter", type=FOLDER)
@click.option("-o", "--out", "output", type=FOLDER, required=True, help="The LoRA folder to write.")
@click.option(
    "--base", type=FOLDER, help="The base model's folder, where the adapter's config doesn't lead to it."
)
@projection_rounding_option
@trained_as_option
@force_option
@json_option
def to_lora(
    adapter: Path,
    output: Path,
    base: Path | None,
    projection_rounding: str | None,
    trained_as: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER as a LoRA adapter that computes exactly the same, for tools that know only LoRA."""
    made = vera_edge.to_lora(
        adapter,
        out=output,
        base=base,
        projection_rounding=projection_rounding,
        trained_as=trained_as,
        force=force,
    )
    for sentence in made.notes:
        note(sentence)
    if as_json:
        print_json(made.to_dict())
    else:
        out().print(
            f"{made.folder}: LoRA of rank {made.rank} on {made.layers} layers, {made.size / 1e6:.1f} MB"
        )
