"""vera-edge: put a VeRA adapter, and the quantized model it was trained on, onto a small device.

The public interface is what `__all__` names: a function for each command, what they give, the errors. All of
it is imported when it is first asked for, so that `import vera_edge` takes no time and no library; here
nothing at all, since `python -m vera_edge` has to begin with `import_path`.
See ARCHITECTURE.md for how the modules behind it follow each other.
"""

__version__ = "0.2.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vera_edge.api.adapt import Adapted as Adapted
    from vera_edge.api.adapt import adapt as adapt
    from vera_edge.api.adapters import WrittenAdapter as WrittenAdapter
    from vera_edge.api.adapters import combine_adapters as combine_adapters
    from vera_edge.api.adapters import freeze_adapter as freeze_adapter
    from vera_edge.api.adapters import pack_adapter as pack_adapter
    from vera_edge.api.adapters import to_lora as to_lora
    from vera_edge.api.bench import Bench as Bench
    from vera_edge.api.bench import bench as bench
    from vera_edge.api.chat import Conversation as Conversation
    from vera_edge.api.chat import chat as chat
    from vera_edge.api.diff import Difference as Difference
    from vera_edge.api.diff import diff as diff
    from vera_edge.api.diff import diff_adapters as diff_adapters
    from vera_edge.api.doctor import Diagnosis as Diagnosis
    from vera_edge.api.doctor import doctor as doctor
    from vera_edge.api.drift import DriftReport as DriftReport
    from vera_edge.api.drift import EncoderReport as EncoderReport
    from vera_edge.api.drift import Interval as Interval
    from vera_edge.api.drift import drift as drift
    from vera_edge.api.drift import drift_each as drift_each
    from vera_edge.api.export import Export as Export
    from vera_edge.api.export import PlannedExport as PlannedExport
    from vera_edge.api.export import export as export
    from vera_edge.api.export import plan_export as plan_export
    from vera_edge.api.fetch import Fetched as Fetched
    from vera_edge.api.fetch import fetch as fetch
    from vera_edge.api.golden import golden as golden
    from vera_edge.api.inspect import Inspection as Inspection
    from vera_edge.api.inspect import inspect as inspect
    from vera_edge.api.install import Installed as Installed
    from vera_edge.api.install import install as install
    from vera_edge.api.install import patch as patch
    from vera_edge.api.install import rollback as rollback
    from vera_edge.api.install import update as update
    from vera_edge.api.merge import MergeReport as MergeReport
    from vera_edge.api.merge import Plan as Plan
    from vera_edge.api.merge import PlannedMerge as PlannedMerge
    from vera_edge.api.merge import merge as merge
    from vera_edge.api.merge import merge_each as merge_each
    from vera_edge.api.merge import plan_merge as plan_merge
    from vera_edge.api.merge import plan_merge_each as plan_merge_each
    from vera_edge.api.open_bundle import open_bundle as open_bundle
    from vera_edge.api.plan import ChosenPlan as ChosenPlan
    from vera_edge.api.plan import plan as plan
    from vera_edge.api.projections import Provenance as Provenance
    from vera_edge.api.projections import projections as projections
    from vera_edge.api.quantize import Quantized as Quantized
    from vera_edge.api.quantize import quantize as quantize
    from vera_edge.api.release import Release as Release
    from vera_edge.api.release import plan_release as plan_release
    from vera_edge.api.release import rebuild as rebuild
    from vera_edge.api.release import release as release
    from vera_edge.api.serve import serve as serve
    from vera_edge.api.sign import sign as sign
    from vera_edge.api.validate import Validation as Validation
    from vera_edge.api.validate import validate as validate
    from vera_edge.api.verify import Manifest as Manifest
    from vera_edge.api.verify import read_manifest as read_manifest
    from vera_edge.api.verify import verify as verify
    from vera_edge.base.trained_as import TrainedAs as TrainedAs
    from vera_edge.device.runtime.encoder import Encoder as Encoder
    from vera_edge.device.runtime.session import Session as Session
    from vera_edge.errors import AdapterError as AdapterError
    from vera_edge.errors import BundleError as BundleError
    from vera_edge.errors import BundleWarning as BundleWarning
    from vera_edge.errors import CheckpointError as CheckpointError
    from vera_edge.errors import DataError as DataError
    from vera_edge.errors import DriftExceeded as DriftExceeded
    from vera_edge.errors import FormatError as FormatError
    from vera_edge.errors import MismatchError as MismatchError
    from vera_edge.errors import OutputError as OutputError
    from vera_edge.errors import PlanError as PlanError
    from vera_edge.errors import ReadError as ReadError
    from vera_edge.errors import TargetError as TargetError
    from vera_edge.errors import VeraEdgeError as VeraEdgeError
    from vera_edge.errors import WorkerError as WorkerError
    from vera_edge.progress import Progress as Progress
    from vera_edge.progress import Tell as Tell

# module -> what of it is public; the imports above say the same to type checkers, which a test holds
_PUBLIC = {
    "api.adapt": ("Adapted", "adapt"),
    "api.adapters": ("WrittenAdapter", "combine_adapters", "freeze_adapter", "pack_adapter", "to_lora"),
    "api.bench": ("Bench", "bench"),
    "api.chat": ("Conversation", "chat"),
    "api.diff": ("Difference", "diff", "diff_adapters"),
    "api.doctor": ("Diagnosis", "doctor"),
    "api.drift": ("DriftReport", "EncoderReport", "Interval", "drift", "drift_each"),
    "api.export": ("Export", "PlannedExport", "export", "plan_export"),
    "api.fetch": ("Fetched", "fetch"),
    "api.golden": ("golden",),
    "api.inspect": ("Inspection", "inspect"),
    "api.install": ("Installed", "install", "patch", "rollback", "update"),
    "api.merge": (
        *("MergeReport", "Plan", "PlannedMerge"),
        *("merge", "merge_each", "plan_merge", "plan_merge_each"),
    ),
    "api.open_bundle": ("open_bundle",),
    "api.plan": ("ChosenPlan", "plan"),
    "api.projections": ("Provenance", "projections"),
    "api.quantize": ("Quantized", "quantize"),
    "api.release": ("Release", "plan_release", "rebuild", "release"),
    "api.serve": ("serve",),
    "api.sign": ("sign",),
    "api.validate": ("Validation", "validate"),
    "api.verify": ("Manifest", "read_manifest", "verify"),
    "base.trained_as": ("TrainedAs",),
    "device.runtime.encoder": ("Encoder",),
    "device.runtime.session": ("Session",),
    "errors": (
        *("AdapterError", "BundleError", "BundleWarning", "CheckpointError", "DataError", "DriftExceeded"),
        *("FormatError", "MismatchError", "OutputError", "PlanError", "ReadError", "TargetError"),
        *("VeraEdgeError", "WorkerError"),
    ),
    "progress": ("Progress", "Tell"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULES)


if not TYPE_CHECKING:  # so that type checkers go on to refuse names that there aren't

    def __getattr__(name: str) -> object:
        """Import what is asked for; it is found without this from then on."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
