"""`vera-edge adapter`: pack, list, compare and combine adapters, and write one as LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import vera_edge
from vera_edge.cli.show import (
    FOLDER,
    force_option,
    json_option,
    note,
    out,
    print_json,
    progress_bar,
    projection_rounding_option,
    quiet_option,
    trained_as_option,
    weighted_paths,
)

if TYPE_CHECKING:
    from vera_edge.api.adapters import WrittenAdapter


@click.group()
def adapter() -> None:
    """Adapters on their own: kilobytes that an exported base takes in milliseconds."""


@adapter.command()
@click.argument("adapter", type=FOLDER)
@click.option("--for", "bundle", type=FOLDER, required=True, help="The branch bundle that will run it.")
@click.option(
    "-o",
    "--out",
    "output",
    type=FOLDER,
    required=True,
    help="The .onnx_adapter or .gguf to write.",
)
@click.option("--weight", type=float, default=1.0, show_default=True, help="Scales the adapter's delta.")
@click.option("--base", type=FOLDER, help="The base's folder, which DoRA, IA3 and GGUF bundles need.")
@trained_as_option
@force_option
@json_option
def pack(
    adapter: Path,
    bundle: Path,
    output: Path,
    weight: float,
    base: Path | None,
    trained_as: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Pack the PEFT folder ADAPTER for a bundle that was exported with --mode branch.

    ADAPTER may be a LoRA that Olive wrote as an .onnx_adapter, too.
    In float32 or float16, as the bundle was exported (--vectors).
    Refused when rank, seed, projections, layers or shapes aren't the bundle's: ONNX Runtime would run such a
    file without a word.
    """
    packed = vera_edge.pack_adapter(
        adapter, bundle, out=output, weight=weight, base=base, trained_as=trained_as, force=force
    )
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


@adapter.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...", callback=weighted_paths)
@click.option("-o", "--out", "output", type=FOLDER, required=True, help="The PEFT folder to write.")
@click.option("--base", type=FOLDER, required=True, help="The base model's folder.")
@click.option(
    "--combination",
    default="cat",
    show_default=True,
    metavar="KIND",
    help="Of factors: linear, ties, dare_linear, dare_ties, magnitude_prune. Of deltas: cat, the sum itself; "
    "cut to a rank: svd, ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd.",
)
@click.option("--density", type=float, help="The share of values that ties, dare and magnitude_prune keep.")
@click.option(
    "--majority-sign", metavar="SIGN", help="Of ties: total, the sum's sign, or frequency.  [default: total]"
)
@click.option("--rank", type=int, help="What an SVD cuts to.  [default: the largest of the adapters']")
@click.option("--seed", type=int, help="Of dare's draws.  [default: 0]")
@projection_rounding_option
@trained_as_option
@force_option
@quiet_option
@json_option
def combine(
    adapters: list[tuple[Path, float]],
    output: Path,
    base: Path,
    combination: str,
    density: float | None,
    majority_sign: str | None,
    rank: int | None,
    seed: int | None,
    projection_rounding: str | None,
    trained_as: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Combine adapters of one base into one, as PEFT's add_weighted_adapter does for LoRA.

    They may be of several methods. The result is LoRA; VeRA where factors of VeRA adapters with the same
    projections are combined.
    """
    with progress_bar(quiet or as_json) as progress:
        made = vera_edge.combine_adapters(
            adapters,
            out=output,
            base=base,
            combination=combination,
            density=density,
            majority_sign=majority_sign,
            rank=rank,
            seed=seed,
            projection_rounding=projection_rounding,
            trained_as=trained_as,
            force=force,
            progress=progress,
        )
    _show(made, as_json)


@adapter.command("to-lora")
@click.argument("adapter", type=FOLDER)
@click.option("-o", "--out", "output", type=FOLDER, required=True, help="The LoRA folder to write.")
@click.option(
    "--base", type=FOLDER, help="The base model's folder, where the adapter's config doesn't lead to it."
)
@click.option(
    "--rank", type=int, help="Approximate by a LoRA of this rank.  [default: the adapter's own, if exact]"
)
@click.option("--max-error", type=float, help="Write nothing when more of the change is lost, like 0.05.")
@projection_rounding_option
@trained_as_option
@force_option
@quiet_option
@json_option
def to_lora(
    adapter: Path,
    output: Path,
    base: Path | None,
    rank: int | None,
    max_error: float | None,
    projection_rounding: str | None,
    trained_as: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write ADAPTER, of any method, as a LoRA adapter, for tools that know only LoRA.

    VeRA's computes exactly the same. Of a method whose change isn't of low rank --rank takes the nearest
    LoRA of that rank, and the error is told: the share of the change that it has no room for.
    """
    with progress_bar(quiet or as_json) as progress:
        made = vera_edge.to_lora(
            adapter,
            out=output,
            base=base,
            rank=rank,
            max_error=max_error,
            projection_rounding=projection_rounding,
            trained_as=trained_as,
            force=force,
            progress=progress,
        )
    _show(made, as_json)


def _show(made: WrittenAdapter, as_json: bool) -> None:
    for sentence in made.notes:
        note(sentence)
    if as_json:
        print_json(made.to_dict())
        return
    title = {"LORA": "LoRA", "VERA": "VeRA"}.get(made.method, made.method)
    size = f"{made.size / 1e6:.1f} MB" if made.size >= 1e5 else f"{made.size / 1e3:.1f} KB"
    out().print(f"{made.folder}: {title} of rank {made.rank} on {made.layers} layers, {size}")
    if made.error is not None:
        worst = max(made.layer_errors, key=lambda module: made.layer_errors[module])
        out().print(
            f"error {made.error:.2e} of the change, the largest {made.layer_errors[worst]:.2e} at {worst}"
        )
    if made.from_sum:
        out().print(f"{made.from_sum:.2e} away from the weighted sum of the deltas")
