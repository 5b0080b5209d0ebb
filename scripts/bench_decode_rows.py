"""What scripts/bench_decode compares: our exports and peers, what each loses, what a token reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench_drift_ways import BLOCKS, EXPANDED
from scripts.prepare_demo import ROOT
from vera_edge.device.runtime import four_bit_graph
from vera_edge.device.runtime.four_bit import expanded_bytes
from vera_edge.device.runtime.onnx_file import OnnxFile

LLAMA_CPP_HUGE = "llama.cpp, Q4_0, 2 MB pages"
BUILDER, LLAMA_CPP, PEFT = "GenAI's builder, int4", "llama.cpp, Q4_0", "torch, PEFT on NF4"
_LLAMA_CPP_8 = "llama.cpp, Q8_0"
_INT4_64_ROW = "int4 merged, blocks of 64"  # of docs/drift-table.md
_DRIFT = ROOT / "docs" / "drift-table.md"
_LOOKED_UP = ("Gather", "GatherBlockQuantized")  # which read a row of a table, not all of it


@dataclass(frozen=True)
class Device:
    """How a way runs in vera_edge.device: as `Session.open`'s arguments of these names."""

    four_bit: str = "kept"
    resident: bool = False
    huge_pages: bool = False

    def words(self) -> list[str]:
        """As arguments of scripts/bench_session."""
        return [
            *("--four-bit", self.four_bit),
            *["--resident"] * self.resident,
            *["--huge-pages"] * self.huge_pages,
        ]


@dataclass(frozen=True)
class Way:
    """One of our exports.

    against: the way its ratio is taken to. drift: its row of docs/drift-table.md, or `lost` what stands
    elsewhere. device: it runs in vera_edge.device, so; else in ONNX Runtime GenAI. planned: weights, blocks
    and head are those that a plan chooses (bench_drift_ways.plan_blocks).
    """

    name: str
    mode: str
    weights: str
    against: str
    drift: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    device: Device | None = None
    lost: str = ""
    planned: bool = False

    @property
    def folder(self) -> str:
        """Ways that differ in nothing but how they run share an export."""
        if self.planned:
            return "plan"
        settings = "-".join(f"{key}-{value}" for key, value in sorted(self.options.items()))
        return "-".join(part for part in (self.mode, self.weights, settings) if part)


_B64, _B128 = {"block": "64"}, {"block": "128"}
_HEAD = {"head": "int4"}
_HUGE = Device(huge_pages=True)
_NARROW, _WIDE = "branch int4, int4 projections", "branch int8, fp32 projections"
_INT4, _INT4_64, _INT4_HUGE = "merged int4", "merged int4, blocks of 64", "merged int4, 2 MB pages"
_INT4_128 = "merged int4, blocks of 128"
_PLAN = "merged by a plan, int4 and int8"
_ON_DEVICE = "0.08% ([device.md](device.md#running))"
WAYS = (
    Way("merged int4, int4 head", "merged", "int4", BUILDER, "int4 merged, int4 head", _HEAD),
    Way(_INT4, "merged", "int4", LLAMA_CPP, "int4 merged"),
    Way(_INT4_HUGE, "merged", "int4", LLAMA_CPP_HUGE, "int4 merged", device=_HUGE),
    Way(_INT4_64, "merged", "int4", LLAMA_CPP, _INT4_64_ROW, _B64),
    Way(f"{_INT4_64}, 2 MB pages", "merged", "int4", LLAMA_CPP_HUGE, _INT4_64_ROW, _B64, _HUGE),
    Way(f"{_INT4_64}, int4 head", "merged", "int4", LLAMA_CPP, f"{_INT4_64_ROW}, int4 head", _B64 | _HEAD),
    Way(_PLAN, "merged", "int4", LLAMA_CPP, BLOCKS, planned=True),
    Way(f"{_PLAN}, 2 MB pages", "merged", "int4", LLAMA_CPP_HUGE, BLOCKS, device=_HUGE, planned=True),
    Way("branch int4", "branch", "int4", _INT4, "int4 branch"),
    Way("branch int4, resident", "branch", "int4", _INT4, "int4 branch", device=Device(resident=True)),
    Way(
        "branch int4, resident, 2 MB pages",
        "branch",
        "int4",
        _INT4_HUGE,
        "int4 branch",
        device=Device(resident=True, huge_pages=True),
    ),
    Way(_NARROW, "branch", "int4", _INT4, "int4 branch, int4 projections", {"projections": "int4"}),
    Way("merged int8", "merged", "int8", _LLAMA_CPP_8, "int8 merged"),
    Way("merged int8, blocks of 64", "merged", "int8", _LLAMA_CPP_8, "int8 merged, blocks of 64", _B64),
    Way("merged int8, 2 MB pages", "merged", "int8", _LLAMA_CPP_8, "int8 merged", device=_HUGE),
    Way("branch int8", "branch", "int8", "merged int8", "int8 branch"),
    Way(_WIDE, "branch", "int8", "merged int8", "int8 branch, fp32 projections", {"projections": "fp32"}),
    Way("branch nf4", "branch", "nf4", "branch int8", "nf4 branch"),
    Way("branch nf4, expanded", "branch", "nf4", "branch int8", device=Device("expanded"), lost=_ON_DEVICE),
    Way(
        "branch nf4, int8 head, expanded",
        "branch",
        "nf4",
        "branch int8",
        EXPANDED,
        {"head": "int8"},
        Device("expanded"),
    ),
    Way(
        "branch nf4, expanded, int8 activations",
        "branch",
        "nf4",
        "branch int8",
        device=Device("int8"),
        lost="0.57% (there too)",
    ),
)
# Of random weights, so that nothing can be lost.
LARGE_WAYS = (
    Way(_INT4, "merged", "int4", LLAMA_CPP),
    Way(_INT4_HUGE, "merged", "int4", LLAMA_CPP_HUGE, device=_HUGE),
    Way(_INT4_128, "merged", "int4", LLAMA_CPP, options=_B128),
    Way(f"{_INT4_128}, 2 MB pages", "merged", "int4", LLAMA_CPP_HUGE, options=_B128, device=_HUGE),
    Way(f"{_INT4_128}, int4 head", "merged", "int4", LLAMA_CPP, options=_B128 | _HEAD),
    Way("branch int4", "branch", "int4", _INT4),
    Way("branch int4, resident", "branch", "int4", _INT4, device=Device(resident=True)),
    Way("merged int8", "merged", "int8", _LLAMA_CPP_8),
    Way("branch int8", "branch", "int8", "merged int8"),
    Way(
        "branch nf4, int8 head, expanded",
        "branch",
        "nf4",
        "branch int8",
        options={"head": "int8"},
        device=Device("expanded"),
    ),
)


@dataclass(frozen=True)
class GgufWay:
    """A GGUF file in llama.cpp, of llama.cpp's own quantizer or `ours`: merged, by `export --target gguf`.

    kind: llama.cpp's name of the type. against, drift: as of a Way. huge_pages: glibc asks for pages of 2 MB
    for what llama.cpp allocates.
    """

    name: str
    kind: str
    against: str
    drift: str
    ours: bool = True
    huge_pages: bool = False


GGUF_WAYS = (
    GgufWay(LLAMA_CPP, "Q4_0", "merged int4", "llama.cpp Q4_0", ours=False),
    GgufWay(LLAMA_CPP_HUGE, "Q4_0", LLAMA_CPP, "llama.cpp Q4_0", ours=False, huge_pages=True),
    GgufWay("GGUF Q4_0", "Q4_0", LLAMA_CPP, "Q4_0, ours"),
    GgufWay("GGUF IQ4_NL", "IQ4_NL", LLAMA_CPP, "IQ4_NL, ours"),
    GgufWay("GGUF Q4_K_M", "Q4_K_M", LLAMA_CPP, "Q4_K_M, ours"),
    GgufWay(_LLAMA_CPP_8, "Q8_0", "merged int8", "Q8_0", ours=False),
    GgufWay("GGUF Q8_0", "Q8_0", _LLAMA_CPP_8, "Q8_0"),
)
LARGE_GGUF_WAYS = tuple(way for way in GGUF_WAYS if not way.ours)
_PEERS = {BUILDER: "ONNX Runtime GenAI builder, int4 rtn"}


def lost() -> dict[str, str]:
    """What each way loses of the adapter's effect, by docs/drift-table.md; only those that stand there.

    The page's first sections speak of the demo; further down are rows of the same names about other models.
    """
    shares = dict[str, str]()
    for line in _DRIFT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if len(cells) > 7 and cells[4].endswith("%"):
            shares.setdefault(cells[0], cells[4])
    rows = _PEERS | {way.name: way.drift for way in (*WAYS, *GGUF_WAYS)}
    elsewhere = {way.name: way.lost for way in WAYS if way.lost}
    return elsewhere | {name: shares[row] for name, row in rows.items() if row in shares}


def read_bytes(graph: Path, expanded: bool = False) -> int:
    """Bytes of weights that a token reads at least: each once, and no tables that are looked up in.

    expanded: of a graph whose 4-bit products vera_edge.device runs as int8 blocks.
    """
    file = OnnxFile.read(graph)
    names = {name for node in file.nodes if node.op not in _LOOKED_UP for name in node.inputs}
    places: dict[tuple[str | None, str | None], int] = {}
    for name in names & file.initializers.keys():
        one = file.initializers[name]
        place = (one.place.get("location"), one.place.get("offset")) if one.place else (name, None)
        places[place] = max(one.nbytes, places.get(place, 0))
    products = four_bit_graph.products(graph) if expanded else []
    more = sum(expanded_bytes(one.shape) for one in products)
    return (
        more
        + sum(places.values())
        - sum(file.initializers[name].nbytes for one in products for name in (one.packed, one.absmax))
    )
