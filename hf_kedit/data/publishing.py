"""Publish a dataset in this library's columns as Parquet on the Hub, so that plain ``load_dataset`` reads it.

The original files of the field mostly do not load that way. Only data whose licence allows it are passed on, with
licence and origin in the card.
"""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset, DatasetDict

from ..errors import DataError
from ..storage.display import markdown_code, markdown_text, python_text
from ..storage.repository import hub_errors
from .features import FEATURES
from .loading import dataset_entry, load_edit_dataset
from .report import load_report

_LICENCES = {
    "mit": "mit",
    "apache-2.0": "apache-2.0",
    "cc by 4.0": "cc-by-4.0",
    "cc by-sa 3.0": "cc-by-sa-3.0",
    "cc by-sa 4.0": "cc-by-sa-4.0",
    "cc0-1.0": "cc0-1.0",
}
"""Licence that allows passing data on → its id on the Hub."""
_TEXT = """
# {title}

Edit requests in the columns of [hf_kedit](https://pypi.org/project/hf_kedit/): the prompt, the new and the old
answers, other wordings, and locality and portability probes. Written by `hf_kedit.data.as_hub_parquet`.

```python
from datasets import load_dataset

requests = load_dataset({repo}, split={split})
```

Origin: {origin}. Licence: {licence}. {rows}
"""


def as_hub_parquet(
    data: str | Dataset | DatasetDict,
    repo_id: str,
    *,
    split: str = "all",
    licence: str | None = None,
    origin: str | None = None,
    private: bool = False,
    token: str | None = None,
    **options: Any,
) -> str:
    """Push a dataset to the Hub as Parquet files with a card.

    Args:
        data: name of a registered dataset; or a table, or a dict of splits, with the columns of ``FEATURES``.
        repo_id: of the dataset repository (``me/name``); made if it does not exist.
        split: of a registered dataset.
        licence: id of the licence on the Hub (``mit``); default: that of the registered dataset, which must be one
            that allows passing the data on. Naming one says that you may.
        origin: where the data are from; default: where the registered dataset is published.
        private: make the repository private.
        token: for the Hub.
        options: of `load_edit_dataset` (``path=…``, ``drop_conflicts=…``).

    Returns:
        The address of the repository.

    Raises:
        DataError: if the licence does not allow it or none is named, a split has other columns, or loading fails.
        HubError: if the repository cannot be written.
    """
    from huggingface_hub import DatasetCard, HfApi

    title, stated = repo_id.rsplit("/", 1)[-1], licence
    if isinstance(data, str):
        entry = dataset_entry(data)
        title = entry.name
        if entry.source is not None:
            stated = licence or entry.source.licence
            origin = origin or entry.source.published
        licence = licence or hub_licence(stated or "", entry.name)
        loaded = load_edit_dataset(data, split, **options)
        tables = dict(loaded) if isinstance(loaded, DatasetDict) else {_split_of(loaded): loaded}
    else:
        tables = dict(data) if isinstance(data, DatasetDict) else {"test": data}
    if licence is None or origin is None:
        raise DataError("say under which licence the data may be passed on (licence='mit') and where from (origin=…)")
    for name, table in tables.items():
        if not isinstance(table, Dataset):
            raise DataError(f"a {type(table).__name__} is no table: push what load_edit_dataset makes of it")
        if table.features != FEATURES:
            raise DataError(f"split {name!r} does not have the columns of hf_kedit.data.FEATURES")
    with hub_errors(repo_id):
        DatasetDict(tables).push_to_hub(repo_id, private=private, token=token)
        card = DatasetCard.load(repo_id, token=token)  # written by the push: it names columns and files
        card.data.license, card.data.pretty_name = licence, title
        card.data.tags = ["knowledge-editing", "hf_kedit"]
        card.text = _TEXT.format(
            title=markdown_text(title),
            repo=python_text(repo_id),
            split=python_text(next(iter(tables))),
            origin=markdown_text(str(origin)),
            licence=markdown_text(str(stated)),
            rows=", ".join(f"{len(table)} rows in {markdown_code(name)}" for name, table in tables.items()) + ".",
        )
        card.push_to_hub(repo_id, repo_type="dataset", token=token)
        return f"{HfApi().endpoint}/datasets/{repo_id}"


def hub_licence(stated: str, name: str) -> str:
    """The id on the Hub of a licence that allows passing data on.

    Args:
        stated: licence in words, as a `Source` has it.
        name: of the dataset, for the message.

    Raises:
        DataError: it does not allow that, or does not clearly say so.
    """
    first = re.split(r"[;,]", stated.rpartition(": ")[2])[0].strip().lower()
    if first not in _LICENCES:
        raise DataError(
            f"the licence of {name!r} ({stated or 'none is known'}) does not clearly allow passing it on; if you may,"
            " name the licence: licence='mit'"
        )
    return _LICENCES[first]


def _split_of(table: Dataset) -> str:
    return load_report(table).split
