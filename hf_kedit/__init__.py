"""Knowledge editing for Hugging Face models: change what a model knows, see it, undo it, save it, measure it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .compat.peft_import import register_when_imported
from .registry import announce
from .version import __version__

_LAZY = {
    "AutoEditConfig": "config",
    "EditConfig": "config",
    "Edit": "journal",
    "EditRequest": "requests",
    "EditResult": "journal",
    "EditTrainer": "training",
    "EditTrainingArguments": "training",
    "Editor": "editors.editor",
    "EditableModel": "model",
    "KeditError": "errors",
    "Probe": "requests",
    "Comparison": "evaluation",
    "collect_report": "evaluation",
    "evaluate_edits": "evaluation",
    "list_metrics": "evaluation",
    "load_metric": "evaluation",
    "load_edit_dataset": "data",
    "causal_trace": "locate",
    "load_requests": "requests",
    "suggest_layers": "locate",
    "untie_head": "engine.weights",
}
_MODULES = ("data", "embedded", "errors", "evaluation", "locate", "logging", "methods", "training")

if TYPE_CHECKING:
    from . import data, embedded, errors, evaluation, locate, logging, methods, training
    from .config import AutoEditConfig, EditConfig
    from .data import load_edit_dataset
    from .editors.editor import Editor
    from .engine.weights import untie_head
    from .errors import KeditError
    from .evaluation import Comparison, collect_report, evaluate_edits, list_metrics, load_metric
    from .journal import Edit, EditResult
    from .locate import causal_trace, suggest_layers
    from .methods.alphaedit import AlphaEditConfig
    from .methods.core import COREConfig
    from .methods.defer import DEFERConfig
    from .methods.eamet import EAMETConfig
    from .methods.emmet import EMMETConfig
    from .methods.ft import FTLConfig, FTMConfig
    from .methods.grace import GRACEConfig
    from .methods.ike import IKEConfig, PromptConfig
    from .methods.instructedit import InstructEditConfig
    from .methods.ke import KEConfig
    from .methods.kn import KNConfig
    from .methods.lora import AdaLoRAConfig, LoRAConfig, QLoRAConfig
    from .methods.malmen import MALMENConfig
    from .methods.melo import MELOConfig
    from .methods.memit import MEMITConfig
    from .methods.memit_fe import MEMITFEConfig
    from .methods.mend import MENDConfig
    from .methods.namet import NAMETConfig
    from .methods.pmet import PMETConfig
    from .methods.r_rome import RROMEConfig
    from .methods.rledit import RLEditConfig
    from .methods.rome import ROMEConfig
    from .methods.serac import SERACConfig
    from .methods.simie import SimIEConfig
    from .methods.sphere import SPHEREConfig
    from .methods.ultraedit import UltraEditConfig
    from .model import EditableModel
    from .requests import EditRequest, Probe, load_requests
    from .training import EditTrainer, EditTrainingArguments

__all__ = [
    "AdaLoRAConfig",
    "AlphaEditConfig",
    "AutoEditConfig",
    "COREConfig",
    "Comparison",
    "DEFERConfig",
    "EAMETConfig",
    "EMMETConfig",
    "Edit",
    "EditConfig",
    "EditRequest",
    "EditResult",
    "EditTrainer",
    "EditTrainingArguments",
    "EditableModel",
    "Editor",
    "FTLConfig",
    "FTMConfig",
    "GRACEConfig",
    "IKEConfig",
    "InstructEditConfig",
    "KEConfig",
    "KNConfig",
    "KeditError",
    "LoRAConfig",
    "MELOConfig",
    "MEMITConfig",
    "MEMITFEConfig",
    "MALMENConfig",
    "MENDConfig",
    "NAMETConfig",
    "PMETConfig",
    "Probe",
    "PromptConfig",
    "QLoRAConfig",
    "RLEditConfig",
    "ROMEConfig",
    "RROMEConfig",
    "SERACConfig",
    "SPHEREConfig",
    "SimIEConfig",
    "UltraEditConfig",
    "__version__",
    "causal_trace",
    "collect_report",
    "data",
    "embedded",
    "errors",
    "evaluate_edits",
    "evaluation",
    "list_metrics",
    "load_edit_dataset",
    "load_metric",
    "load_requests",
    "locate",
    "logging",
    "methods",
    "suggest_layers",
    "untie_head",
    "training",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``import hf_kedit`` is quick."""
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name.endswith("Config"):  # every method's config is a public name
        for method in importlib.import_module(".methods", __name__).registered_methods().values():
            if method.config_class.__name__ == name:
                return method.config_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


announce("hf_kedit.methods")
register_when_imported()
