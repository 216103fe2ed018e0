"""``kedit serve``: a model with its edits behind OpenAI's protocol."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ServeError
from .models import LoadOptions, MethodOptions, UntieOption, open_model
from .output import DebugOption, Format, FormatOption, command, emit, error_console

if TYPE_CHECKING:
    from rich.console import Console


@command
def serve(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_EDITS",
            help="Hub id or folder of a model, a GGUF file, an embedded model, or saved edits of any kind.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="What clients call it; default: its Hub id, or the folder's name.", show_default=False
        ),
    ] = None,
    pack: Annotated[
        list[str] | None,
        typer.Option("--pack", metavar="NAME=SOURCE", help='Saved edits, asked for as "base+NAME"; may be repeated.'),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; other machines reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes one that is free.")] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env", metavar="VARIABLE", help="Environment variable with the key that questions need."
        ),
    ] = None,
    allow_edits: Annotated[
        bool, typer.Option("--allow-edits", help="Let clients make and undo edits at /v1/edits; needs --token-env.")
    ] = False,
    token_env: Annotated[
        str | None,
        typer.Option("--token-env", metavar="VARIABLE", help="Environment variable with the token that edits need."),
    ] = None,
    how: MethodOptions = MethodOptions(),
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-prompt-tokens", min=1, help="Longest prompt; default: the model's context.", show_default=False
        ),
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", min=1024, help="Largest request, in bytes.")] = 2**20,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Answers that are made at the same time.")] = 4,
    waiting: Annotated[int, typer.Option("--waiting", min=0, help="Further requests that may wait.")] = 64,
    load: LoadOptions = LoadOptions(),
    untie: UntieOption = False,
    format: FormatOption = Format.human,
    debug: DebugOption = False,
) -> None:
    """Serve a model with its edits, whatever their kind, to every client that speaks OpenAI's protocol.

    "model": "base" is the unedited model, "base+NAME" the model with a pack. --method is for edits that clients make
    (default: that of the saved edits, else auto).
    """
    packs = [_pack(text) for text in pack or ()]
    if allow_edits and token_env is None:
        raise typer.BadParameter("edits need a token: give --token-env VARIABLE", param_hint="--allow-edits")
    if token_env is not None and not allow_edits:
        raise typer.BadParameter("there is nothing to edit without --allow-edits", param_hint="--token-env")
    from ..serving.app import Keys, Limits, Service
    from ..serving.running import LOOPBACK_NAMES, address_of, is_loopback, listening, run
    from ..serving.variants import Variants

    local = is_loopback(host)
    keys = Keys(
        asking=_secret(api_key_env), editing=_secret(token_env), hosts=LOOPBACK_NAMES | {host} if local else None
    )
    listener = listening(host, port)  # before the model is loaded, which may take long
    with listener:
        editable = open_model(model, load, how, untie=untie)
        variants = Variants(editable, name or _name_of(model))
        for label, source in packs:
            variants.add_pack(label, source)
        service = Service(variants, Limits(max_prompt_tokens, max_body, parallel, waiting), keys)
        console = error_console()
        if not local:
            _warn(console, host, keys.asking is not None)
        url = f"{address_of(listener)}/v1"
        names = ", ".join(f'"{each}"' for each in variants.names)
        try:
            emit(
                format,
                {"url": url, "models": variants.names},
                human=lambda _: console.print(f"kedit: serving {names} at {url} (Ctrl-C ends it)", soft_wrap=True),
                quiet=[url],
            )
            sys.stdout.flush()
            run(service, listener)
        except KeyboardInterrupt:
            if format is Format.human:
                console.print("kedit: the server has ended")


def _pack(text: str) -> tuple[str, str]:
    """``NAME=SOURCE`` in two.

    Raises:
        typer.BadParameter: if it is something else.
    """
    name, sign, source = text.partition("=")
    if not (sign and name.strip() and source.strip()):
        raise typer.BadParameter(f"{text!r} is not of the form NAME=FOLDER or NAME=org/name", param_hint="--pack")
    return name.strip(), source.strip()


def _secret(variable: str | None) -> str | None:
    """What an environment variable holds.

    Raises:
        ServeError: if that is no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key or " " in key or not key.isascii() or not key.isprintable():
        raise ServeError(
            f"the environment variable {variable} holds no key: set it to letters, digits and signs without spaces"
        )
    return key


def _name_of(model: str) -> str:
    """What a model is called where nothing else is said."""
    path = Path(os.path.expanduser(model))
    return (path.resolve().name if os.path.exists(path) else model).replace("+", "-") or "model"


def _warn(console: Console, host: str, has_key: bool) -> None:
    """Say what it means to listen to other machines."""
    who = "Whoever has the key" if has_key else "Everybody who reaches this machine over the network"
    advice = "" if has_key else " Give --api-key-env VARIABLE, or listen at 127.0.0.1."
    console.print(
        f"kedit: warning: listening at {host}, not only to this machine. {who} can ask the model, and what is sent is"
        f" not encrypted.{advice}",
        style="yellow",
        soft_wrap=True,
    )
