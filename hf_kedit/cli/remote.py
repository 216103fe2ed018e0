"""Options that say which model behind an API is meant."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BackendError

if TYPE_CHECKING:
    from ..remote.backend import OpenAICompatibleBackend


class Api(StrEnum):
    """What the server is asked for."""

    chat = "chat"
    completions = "completions"


BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="URL",
        help="OpenAI-compatible server, up to /v1: edit the model behind it by what it reads. --model, if given, is"
        " saved edits of it.",
        show_default=False,
    ),
]
ApiModelOption = Annotated[str | None, typer.Option("--api-model", help="Name of the model on the --backend.")]
ApiKeyOption = Annotated[
    str | None,
    typer.Option("--api-key-env", metavar="VARIABLE", help="Environment variable with the key; none: no key."),
]
ApiOption = Annotated[
    Api, typer.Option("--api", help="chat: prompts are what a user says; completions: texts to go on with.")
]


@dataclass(frozen=True)
class BackendOptions:
    """Which model behind an API, if one is meant at all."""

    backend: BackendOption = None
    api_model: ApiModelOption = None
    api_key_env: ApiKeyOption = None
    api: ApiOption = Api.chat

    def open(self, system: str | None) -> OpenAICompatibleBackend | None:
        """The backend that the options describe, or ``None``.

        Args:
            system: what the system says in every chat.

        Raises:
            typer.BadParameter: if one of the options lacks another one.
        """
        if self.backend is None:
            if self != BackendOptions():
                raise typer.BadParameter("name the server that this belongs to", param_hint="--backend")
            return None
        if self.api_model is None:
            raise typer.BadParameter("name the model on the server", param_hint="--api-model")
        from ..remote.backend import OpenAICompatibleBackend

        return OpenAICompatibleBackend(
            self.backend, self.api_model, self.api_key_env, api=self.api.value, system=system
        )


class NobodyAsked:
    """Stands in for the model of saved edits where they are changed and nothing is asked.

    Args:
        name: of the model.
    """

    def __init__(self, name: str):
        self.name = name

    def generate(self, *arguments: Any) -> str:
        """Nothing.

        Raises:
            BackendError: always.
        """
        raise BackendError(f"{self.name!r} is behind an API; give --backend to ask it")

    def loglikelihood(self, prompt: str, target: str) -> None:
        """Nothing."""
