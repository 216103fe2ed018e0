"""Knowledge editing for Hugging Face models: change what a model knows, see it, undo it, save it, measure it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .compat.peft_import import register_when_imported
from .registry import announce
from .version import __version__

# The public names, by the modules that they are taken from when they are first used: `import hf_kedit` stays quick.
_PUBLIC = {
    "config": "AutoEditConfig EditConfig",
    "data": "load_edit_dataset",
    "decoding": "DeCoConfig DoLaConfig decode_with",
    "editors.editor": "Editor",
    "engine.weights": "untie_head",
    "errors": "KeditError",
    "evaluation": "Comparison SideEffects collect_report evaluate_edits list_metrics load_metric",
    "journal": "Edit EditResult",
    "locate": "causal_trace suggest_layers",
    "methods.alphaedit": "AlphaEditConfig",
    "methods.anyedit": "AnyEditConfig",
    "methods.auto": "AutoMethodConfig",
    "methods.calinet": "CaliNetConfig",
    "methods.core": "COREConfig",
    "methods.defer": "DEFERConfig",
    "methods.dinm": "DINMConfig",
    "methods.dpo": "DPOConfig",
    "methods.eamet": "EAMETConfig",
    "methods.emmet": "EMMETConfig",
    "methods.ft": "FTLConfig FTMConfig",
    "methods.grace": "GRACEConfig",
    "methods.ike": "IKEConfig PromptConfig",
    "methods.instructedit": "InstructEditConfig",
    "methods.ke": "KEConfig",
    "methods.kn": "KNConfig",
    "methods.lora": "AdaLoRAConfig LoRAConfig QLoRAConfig",
    "methods.malmen": "MALMENConfig",
    "methods.melo": "MELOConfig",
    "methods.memit": "MEMITConfig",
    "methods.memit_fe": "MEMITFEConfig",
    "methods.mend": "MENDConfig",
    "methods.namet": "NAMETConfig",
    "methods.pmet": "PMETConfig",
    "methods.r_rome": "RROMEConfig",
    "methods.rledit": "RLEditConfig",
    "methods.rome": "ROMEConfig",
    "methods.serac": "SERACConfig",
    "methods.simie": "SimIEConfig",
    "methods.sphere": "SPHEREConfig",
    "methods.t_patcher": "TPatcherConfig",
    "methods.ultraedit": "UltraEditConfig",
    "methods.unke": "UnKEConfig",
    "methods.wise": "WISEConfig",
    "model": "EditableModel",
    "remote": "OpenAICompatibleBackend TextBackend",
    "requests": "EditRequest Probe load_requests",
    "text.pictures": "Picture",
    "training": "EditTrainer EditTrainingArguments",
    "tuning": "calibrate",
}
_MODULES = ("data", "embedded", "errors", "evaluation", "locate", "logging", "methods", "training", "tuning")
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = ["__version__", *_MODULES, *_HOME]

if TYPE_CHECKING:  # the same once more for type checkers, which read no dictionaries; a test compares the two
    from . import data as data
    from . import embedded as embedded
    from . import errors as errors
    from . import evaluation as evaluation
    from . import locate as locate
    from . import logging as logging
    from . import methods as methods
    from . import training as training
    from . import tuning as tuning
    from .config import AutoEditConfig as AutoEditConfig
    from .config import EditConfig as EditConfig
    from .data import load_edit_dataset as load_edit_dataset
    from .decoding import DeCoConfig as DeCoConfig
    from .decoding import DoLaConfig as DoLaConfig
    from .decoding import decode_with as decode_with
    from .editors.editor import Editor as Editor
    from .engine.weights import untie_head as untie_head
    from .errors import KeditError as KeditError
    from .evaluation import Comparison as Comparison
    from .evaluation import SideEffects as SideEffects
    from .evaluation import collect_report as collect_report
    from .evaluation import evaluate_edits as evaluate_edits
    from .evaluation import list_metrics as list_metrics
    from .evaluation import load_metric as load_metric
    from .journal import Edit as Edit
    from .journal import EditResult as EditResult
    from .locate import causal_trace as causal_trace
    from .locate import suggest_layers as suggest_layers
    from .methods.alphaedit import AlphaEditConfig as AlphaEditConfig
    from .methods.anyedit import AnyEditConfig as AnyEditConfig
    from .methods.auto import AutoMethodConfig as AutoMethodConfig
    from .methods.calinet import CaliNetConfig as CaliNetConfig
    from .methods.core import COREConfig as COREConfig
    from .methods.defer import DEFERConfig as DEFERConfig
    from .methods.dinm import DINMConfig as DINMConfig
    from .methods.dpo import DPOConfig as DPOConfig
    from .methods.eamet import EAMETConfig as EAMETConfig
    from .methods.emmet import EMMETConfig as EMMETConfig
    from .methods.ft import FTLConfig as FTLConfig
    from .methods.ft import FTMConfig as FTMConfig
    from .methods.grace import GRACEConfig as GRACEConfig
    from .methods.ike import IKEConfig as IKEConfig
    from .methods.ike import PromptConfig as PromptConfig
    from .methods.instructedit import InstructEditConfig as InstructEditConfig
    from .methods.ke import KEConfig as KEConfig
    from .methods.kn import KNConfig as KNConfig
    from .methods.lora import AdaLoRAConfig as AdaLoRAConfig
    from .methods.lora import LoRAConfig as LoRAConfig
    from .methods.lora import QLoRAConfig as QLoRAConfig
    from .methods.malmen import MALMENConfig as MALMENConfig
    from .methods.melo import MELOConfig as MELOConfig
    from .methods.memit import MEMITConfig as MEMITConfig
    from .methods.memit_fe import MEMITFEConfig as MEMITFEConfig
    from .methods.mend import MENDConfig as MENDConfig
    from .methods.namet import NAMETConfig as NAMETConfig
    from .methods.pmet import PMETConfig as PMETConfig
    from .methods.r_rome import RROMEConfig as RROMEConfig
    from .methods.rledit import RLEditConfig as RLEditConfig
    from .methods.rome import ROMEConfig as ROMEConfig
    from .methods.serac import SERACConfig as SERACConfig
    from .methods.simie import SimIEConfig as SimIEConfig
    from .methods.sphere import SPHEREConfig as SPHEREConfig
    from .methods.t_patcher import TPatcherConfig as TPatcherConfig
    from .methods.ultraedit import UltraEditConfig as UltraEditConfig
    from .methods.unke import UnKEConfig as UnKEConfig
    from .methods.wise import WISEConfig as WISEConfig
    from .model import EditableModel as EditableModel
    from .remote import OpenAICompatibleBackend as OpenAICompatibleBackend
    from .remote import TextBackend as TextBackend
    from .requests import EditRequest as EditRequest
    from .requests import Probe as Probe
    from .requests import load_requests as load_requests
    from .text.pictures import Picture as Picture
    from .training import EditTrainer as EditTrainer
    from .training import EditTrainingArguments as EditTrainingArguments
    from .tuning import calibrate as calibrate


def __getattr__(name: str) -> Any:
    """Import public names when they are first used."""
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name.endswith("Config"):  # that of a method from a plug-in
        for method in importlib.import_module(".methods", __name__).registered_methods().values():
            if method.config_class.__name__ == name:
                return method.config_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


announce("hf_kedit.methods")
register_when_imported()
