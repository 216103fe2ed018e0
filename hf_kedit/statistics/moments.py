"""Second moments that were collected once and shared: a folder, or a repository of the Hub.

    stats.json              fingerprint of the weights; per module the corpus, tokens, width and the file's SHA-256
    <module>.safetensors    moment2_sum [d, d] float64 and count: sums, so that sets can be merged exactly
    README.md               the card

They fit the weights that they were collected on, and no others: the fingerprint is compared before they are used.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ArtifactError, HubError, HubUnreachableError, StatisticsError
from ..storage.display import markdown_code, markdown_text, python_text
from ..storage.files import FileSource
from ..storage.parsing import parse_json
from ..storage.repository import push_files
from ..version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_FORMAT_VERSION = 1
FULL_TOKENS_PER_WIDTH = 100
INDEX, _CARD = "stats.json", "README.md"


@dataclass
class SecondMoment:
    """Sum of ``k kᵀ`` over tokens.

    Args:
        total: ``[d, d]`` float64.
        count: number of tokens.
        source: name of the corpus.
    """

    total: torch.Tensor
    count: int
    source: str = ""

    def mean(self) -> torch.Tensor:
        """``C = total / count``, ``[d, d]`` float64."""
        return self.total / max(self.count, 1)

    def shrunk(self) -> torch.Tensor:
        """``C`` as far as its tokens tell it: ``(1 − ρ) C + ρ · tr(C)/d · I``, ``[d, d]`` float64; see `shrinkage`."""
        mean, rho = self.mean(), shrinkage(self.count, self.total.shape[0])
        if rho:
            size = mean.diagonal().mean()
            mean.mul_(1 - rho).diagonal().add_(rho * size)
        return mean

    def fault(self, width: int | None = None) -> str | None:
        """What is wrong with a moment that was read from a file; ``None``: nothing.

        Args:
            width: dimensions that the module reads; ``None``: any number.
        """
        total = self.total
        if total.dim() != 2 or total.shape[0] != total.shape[1] or total.shape[0] != (width or total.shape[0]):
            return f"its matrix is {tuple(total.shape)}, not {f'({width}, {width})' if width else 'square'}"
        if total.dtype != torch.float64:
            return f"its matrix is {total.dtype}, not torch.float64"
        if self.count < 1:
            return f"it is over {self.count} tokens"
        if not bool(torch.isfinite(total).all()) or bool((total.diagonal() < 0).any()):
            return "its matrix holds NaN, infinity, or a negative sum of squares"
        if not bool(total.diagonal().any()):
            return "its matrix is zero"
        return None

    def merged(self, other: SecondMoment) -> SecondMoment:
        """Moments over both sets of tokens."""
        return SecondMoment(self.total + other.total, self.count + other.count, self.source)


def shrinkage(tokens: int, width: int) -> float:
    """How far a second moment over few tokens is drawn towards a scaled identity, ρ of `SecondMoment.shrunk`.

    The more dimensions a token has to inform, the less is known of each: ``ρ = min(½, 0.8 √(d / n))``, found on
    SmolLM2 (d = 1536) with 1,600 to 100,000 tokens by how much the keys of text that was not read are disturbed; from
    100 tokens per dimension on the moment is taken as it is, as the published codes do. That few tokens per dimension
    suffice is the finding of arXiv 2506.04226; shrinking keeps their noise out of the directions hardly seen.

    Args:
        tokens: ``n``.
        width: ``d``.
    """
    return 0.0 if tokens >= FULL_TOKENS_PER_WIDTH * width else min(0.5, 0.8 * (width / max(tokens, 1)) ** 0.5)


def slug(text: str) -> str:
    """A file name for a module or corpus."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
    return kept if len(kept) <= 80 else kept[:60] + "-" + hashlib.sha256(text.encode()).hexdigest()[:12]


# ---------------------------------------------------------------------- reading


class SharedMoments:
    """Moments in a folder or repository that holds a ``stats.json``.

    Args:
        source: where it is.
        index: content of ``stats.json``.

    Raises:
        ArtifactError: if the index is damaged or of a newer format.
    """

    def __init__(self, source: FileSource, index: bytes):
        self.source = source
        content = parse_json(index, f"{source.name}: {INDEX}", ArtifactError)
        try:
            version, self.fingerprint = int(content["format_version"]), str(content["fingerprint"])
            self.model, self.modules = str(content["model"]), dict(content["modules"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ArtifactError(f"{source.name}: {INDEX} is damaged: {error!r}") from error
        if version > _FORMAT_VERSION:
            raise ArtifactError(f"{source.name}: {INDEX} is of the newer format {version}; upgrade hf_kedit")

    def check(self, fingerprint: str) -> None:
        """Raise if the moments belong to other weights.

        Raises:
            StatisticsError: see above.
        """
        if fingerprint != self.fingerprint:
            raise StatisticsError(
                f"the statistics of {self.source.name} were collected on other weights ({self.model}, fingerprint"
                f" {self.fingerprint}) than the model's ({fingerprint}): another revision, another number format, or"
                " an edited model"
            )

    def read(self, module: str) -> SecondMoment:
        """The moment of a module.

        Raises:
            StatisticsError: if there is none.
            ArtifactError: if its file is missing or damaged.
        """
        entry = self.modules.get(module)
        if not isinstance(entry, dict):
            raise StatisticsError(
                f"{self.source.name} holds no statistics of {module}; it has: {', '.join(self.modules) or 'none'}"
            )
        name = f"{slug(module)}.safetensors"
        path = self.source.path(name)
        if path is None or _digest(path) != entry.get("sha256"):
            raise ArtifactError(f"{self.source.name}: {name} is missing, or not the file that {INDEX} describes")
        try:
            with safe_open(path, framework="pt") as file:
                moment = SecondMoment(
                    file.get_tensor("moment2_sum"), int(file.get_tensor("count")), str(entry["corpus"])
                )
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, OverflowError) as error:
            raise ArtifactError(f"{self.source.name}: {name} is damaged: {error}") from error
        if fault := moment.fault():
            raise ArtifactError(f"{self.source.name}: {name} holds no second moment: {fault}")
        return moment


def find_shared(name: str, *, token: Any = None) -> SharedMoments | None:
    """Return the moments of a folder or repository (dataset or model); ``None`` if it holds none.

    Raises:
        ArtifactError: if they are damaged.
        HubError: if there is no such repository, or it is closed.
    """
    missing: HubError | None = None
    for repo_type in ("dataset", "model"):
        source = FileSource(name, repo_type=repo_type, token=token)
        try:
            index = source.read(INDEX)
        except HubUnreachableError:
            return None  # a data set may still be in the cache of `datasets`
        except HubError as error:
            missing = error
            continue
        return None if index is None else SharedMoments(source, index)
    assert missing is not None
    raise missing


# ---------------------------------------------------------------------- writing


def push_moments(
    repo_id: str,
    moments: Mapping[str, SecondMoment],
    *,
    fingerprint: str,
    model: str,
    repo_type: str = "dataset",
    private: bool | None = None,
    tag: str | None = None,
    token: Any = None,
) -> CommitInfo:
    """Push moments to a repository as one commit; modules that it has already and that are not given stay.

    Args:
        repo_id: ``org/name``; made if it does not exist.
        moments: module → moment.
        fingerprint: of the unedited weights.
        model: name of the model, for people.
        repo_type: ``"dataset"`` or ``"model"``.
        private, tag, token: see `push_files`.

    Raises:
        StatisticsError: if there are no moments, or the repository holds those of other weights.
        HubError: if it cannot be written.
    """
    if not moments:
        raise StatisticsError("there are no statistics yet: collect them first, with moments([...]) or `kedit stats`")
    modules = _present(repo_id, repo_type, fingerprint, token)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, bytes | Path] = {}
        for name, moment in moments.items():
            path = Path(folder) / f"{slug(name)}.safetensors"
            tensors = {"moment2_sum": moment.total.contiguous(), "count": torch.tensor(moment.count)}
            save_file(tensors, path, metadata={"format": "pt"})
            files[path.name] = path
            modules[name] = {
                "corpus": moment.source,
                "tokens": moment.count,
                "width": moment.total.shape[0],
                "sha256": _digest(path),
            }
        index = {
            "format_version": _FORMAT_VERSION,
            "kedit_version": __version__,
            "model": model,
            "fingerprint": fingerprint,
            "modules": dict(sorted(modules.items())),
        }
        files[INDEX] = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
        files[_CARD] = _card(repo_id, index).encode("utf-8")
        message = f"Second moments of {len(moments)} module{'' if len(moments) == 1 else 's'}"
        return push_files(repo_id, files, message=message, repo_type=repo_type, private=private, tag=tag, token=token)


def _present(repo_id: str, repo_type: str, fingerprint: str, token: Any) -> dict[str, Any]:
    """The entries of the modules that a repository holds already; none if it does not exist."""
    try:
        source = FileSource(repo_id, repo_type=repo_type, token=token)
        index = source.read(INDEX)
    except HubUnreachableError:
        raise
    except HubError:  # a repository that is not there is made; one that is closed is refused when it is written
        return {}
    if index is None:
        return {}
    present = SharedMoments(source, index)
    present.check(fingerprint)
    return present.modules


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(repo_id: str, index: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {markdown_code(name, cell=True)} | {markdown_text(str(entry.get('width', '?')))}"
        f" | {markdown_text(str(entry.get('tokens', '?')))} | {markdown_text(str(entry.get('corpus', '?')))} |"
        for name, entry in index["modules"].items()  # those that others have pushed among them
        if isinstance(entry, dict)
    )
    return f"""---
library_name: hf_kedit
tags:
- knowledge-editing
- statistics
---

# Second moments of the keys of {markdown_text(index["model"]) or "a model"}

Sums of k kᵀ over tokens, where k is the input of a projection: what ROME, MEMIT and their relatives need to leave
other facts alone. They hold for the unedited weights with the fingerprint `{index["fingerprint"]}` only.

| inputs of | width | tokens | text |
| --- | --- | --- | --- |
{rows}

```python
from hf_kedit import EditableModel, MEMITConfig

config = MEMITConfig(stats_dataset={python_text(repo_id)})
model = EditableModel.from_pretrained({python_text(index["model"] or "the model")}, config)
```
"""
