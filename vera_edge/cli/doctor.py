"""`vera-edge doctor`: what is installed, what this machine can do, and what brings what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.table import Table

import vera_edge
from vera_edge.cli.show import json_option, out, print_json
from vera_edge.errors import DriftExceeded

if TYPE_CHECKING:
    from vera_edge.api.doctor import Diagnosis


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is installed, what this machine can do, and what is missing for which commands.

    Exit 3 when the device part itself lacks something; a missing extra is no fault.
    """
    diagnosis = vera_edge.doctor()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        _show(diagnosis)
    if diagnosis.broken:
        raise DriftExceeded(f"the device part can't work: {'; '.join(diagnosis.broken)}")


def _show(diagnosis: Diagnosis) -> None:
    console = out()
    table = Table("package", "for", "installed", "needed", "")
    for package in diagnosis.packages:
        needed = "" if package.needed is None else f">= {package.needed}"
        state = "" if package.fault is None else package.fault
        table.add_row(package.name, package.extra or "device", package.installed or "-", needed, state)
    console.print(f"vera-edge {diagnosis.vera_edge}", table)
    machine, cores = diagnosis.machine, diagnosis.cores
    if machine:
        console.print(f"{machine['system']}, Python {machine['python']}\n{machine['processor']}")
        console.print(
            f"{', '.join(machine['features']) or 'no instruction sets known'}: {machine['kernels']}"
        )
    bound = f", OMP_NUM_THREADS={cores['omp_num_threads']}" if cores["omp_num_threads"] else ""
    console.print(f"{cores['usable']} of {cores['machine']} cores may be used (affinity, quotas){bound}")
    if diagnosis.free_memory is not None:
        whole = machine.get("memory")
        of = f" of {whole / 1e9:.1f}" if whole else ""
        console.print(f"{diagnosis.free_memory / 1e9:.1f}{of} GB of memory may be taken")
    for extra, names in diagnosis.missing.items():
        console.print(f"{extra}: {', '.join(names)} missing or too old; {diagnosis.advice[extra]}")
