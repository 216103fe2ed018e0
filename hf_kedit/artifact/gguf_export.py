"""Edits for llama.cpp and Ollama: the edited model as a GGUF file, or the edits alone as a LoRA adapter in one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..editing.state import EditedModel
from ..engine.access import together_with_others
from ..engine.weights import get_module, get_weight, weight_shape
from ..errors import ExportError
from ..gguf.families import family_of
from ..gguf.reading import require_gguf
from ..gguf.writing import GgufDtype, Weight, check_dtype, write_adapter, write_model
from ..logging import get_logger
from ..storage.files import named_path
from .lora_tensors import build_adapter, check_factors_only

logger = get_logger(__name__)


@dataclass(frozen=True)
class GgufExported:
    """What was written.

    Args:
        path: of the file.
        architecture: llama.cpp's name of the model's family.
        dtype: number format of the matrices.
        tensors: how many tensors the file holds; of an adapter, how many weights it changes.
        size: of the file, in bytes.
        rank: of an adapter; 0 for a whole model.
        losses: of an adapter, ‖Δ − BA‖ / ‖Δ‖ of the weights whose change was cut to a smaller rank.
    """

    path: Path
    architecture: str
    dtype: str
    tensors: int
    size: int
    rank: int
    losses: dict[str, float]

    @property
    def modelfile(self) -> str:
        """What Ollama's ``Modelfile`` beside the file has to say."""
        return f"FROM ./base.gguf\nADAPTER ./{self.path.name}" if self.rank else f"FROM ./{self.path.name}"


class GgufExport(EditedModel):
    """Methods of `EditableModel` that write GGUF."""

    @together_with_others
    def export_gguf(self, path: str | Path, *, dtype: GgufDtype = "f16") -> GgufExported:
        """Write the model with its edits as one GGUF file, for llama.cpp, Ollama and whatever else reads it.

        Tokenizer, special tokens and chat template go with it. The model in memory stays as it is. Edited weights are
        rounded once, from the exact sum of base and edits.

        Args:
            path: of the file; an older one is replaced when the new one is complete.
            dtype: of the matrices: ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"`` (blocks of 8 bits). llama.cpp's own
                ``llama-quantize`` makes smaller formats from such a file.

        Raises:
            UnsupportedModelError: if the family is none of those that were checked with llama.cpp.
            ExportError: if llama.cpp would compute or read text differently, or there is no tokenizer.
            MergeError: if the model carries edits that are no part of its weights (codebooks, prompts).
            MissingExtraError: if the package ``gguf`` is not installed.
            ArtifactError: if the file cannot be written.
        """
        check_dtype(dtype)
        for book in self.books.values():
            book.check_mergeable()
        family = family_of(self.base_model.config)
        if self.tokenizer is None:
            raise ExportError("a GGUF file holds the tokenizer too, and this model has none; pass tokenizer=")
        self.ledger.check_unchanged()
        tensors = write_model(
            named_path(path, "the file"),
            family,
            self.base_model.config,
            self.tokenizer,
            _weights(self),
            dtype=dtype,
            title=_title(self),
            also_end=_ends(self.base_model),
        )
        return GgufExported(Path(path), family.arch, dtype, tensors, Path(path).stat().st_size, 0, {})

    @together_with_others
    def export_gguf_adapter(self, path: str | Path, *, rank: int | None = None) -> GgufExported:
        """Write the edits alone as a LoRA adapter for llama.cpp (``--lora``) and Ollama (``ADAPTER``).

        It fits every GGUF file of the unedited base model, also a quantised one, which then rounds only the base.

        Args:
            path: of the file; an older one is replaced when the new one is complete.
            rank: of every changed weight; a change that needs more is approximated, and the loss is reported.
                ``None``: what the edits need.

        Raises:
            UnsupportedModelError: if the family is none of those that were checked with llama.cpp.
            ExportError: if the edits are no low-rank changes of matrices, or llama.cpp has no place for one.
            MissingExtraError: if the package ``gguf`` is not installed.
            ArtifactError: if the file cannot be written.
        """
        require_gguf("writing GGUF")
        config = self.base_model.config
        family = family_of(config)
        adapter = build_adapter(self, rank=rank)
        check_factors_only(adapter, "llama.cpp")
        _check_head(self, adapter.factors)
        factors = {f"{path}.weight": f.padded(adapter.rank) for path, f in adapter.factors.items()}
        changed = write_adapter(
            named_path(path, "the file"),
            family,
            config,
            {name: (f.left, f.right) for name, f in factors.items()},
            rank=adapter.rank,
            title=_title(self),
            base=self.base_model_id,
        )
        for key, loss in adapter.losses.items():
            logger.warning("%s: rank %d leaves out %.1f %% of the change", key, adapter.rank, 100 * loss)
        size = Path(path).stat().st_size
        return GgufExported(Path(path), family.arch, "f32", changed, size, adapter.rank, adapter.losses)


def _weights(model: EditedModel) -> Iterator[Weight]:
    """Every parameter once, with its edits in fp32; a tied one under the name of the embeddings."""
    seen: set[int] = set()
    accounts = model.ledger.accounts

    def value(module: torch.nn.Module, key: str, name: str) -> torch.Tensor:
        account = accounts.get(key)
        if account is None or account.total is None:
            return get_weight(module, name)
        return account.original.float() + account.total.to(account.original.device)

    for path, module in model.base_model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            key = f"{path}.{name}"
            yield Weight(key, weight_shape(module, name), functools.partial(value, module, key, name))


def _check_head(model: EditedModel, changed: Iterable[str]) -> None:
    """Raise if a head is changed that was untied for the edits: a file of the base model has no weight for it."""
    base = model.base_model
    head = next((path for path in changed if get_module(base, path) is base.get_output_embeddings()), None)
    account = model.ledger.accounts.get(f"{head}.weight")
    if account is not None and torch.equal(account.original, get_weight(base.get_input_embeddings())):
        raise ExportError(
            f"{head} shared its weight with the embeddings before it was untied, and a file of the base model has no"
            " such weight; write the whole model (export_gguf)"
        )


def _title(model: EditedModel) -> str:
    """The name that runners show."""
    last = model.base_model_id.rstrip("/").replace("\\", "/").rpartition("/")[2].removesuffix(".gguf")
    count = len(model.journal)
    edits = f" with {count} edit{'' if count == 1 else 's'}" if count else ""
    return f"{last or type(model.base_model).__name__}{edits}"


def _ends(base: Any) -> list[int]:
    """Tokens behind which the model stops writing, by its generation settings."""
    ends = getattr(base.generation_config, "eos_token_id", None)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
