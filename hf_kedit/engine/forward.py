"""Calling a stock model: which arguments it takes, and logits at chosen positions only."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..anatomy.outputs import hooks, replace_block_output
from ..anatomy.probing import evaluating
from ..anatomy.switching import Switch, switched
from ..errors import ConfigError
from ..tokens import TokenBatch, TokenIds
from .access import alone
from .weights import compute_device


@lru_cache(maxsize=256)
def _parameters(forward_class: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward_class.forward).parameters


def _inner(model: Any) -> Any:
    """The transformers model inside a wrapper that is called like one."""
    if isinstance(model, PreTrainedModel):
        return model
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def accepts(model: torch.nn.Module, name: str) -> bool:
    """Whether ``model.forward`` has an argument of this name (``**kwargs`` does not count)."""
    kind: Any = type(_inner(model))
    return name in _parameters(kind)


def named_arguments(kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name: those given by position have the names of the forward of the model's class."""
    if not args:
        return kwargs
    names = [name for name in _parameters(kind) if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def device_of(model: torch.nn.Module) -> torch.device:
    """Device on which inputs are expected: where the input embeddings are looked up."""
    find: Any = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    return compute_device(model if embeddings is None else embeddings)


def model_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """Arguments for a plain forward over a padded batch; positions are given wherever the model takes them."""
    kwargs = generation_inputs(model, batch)
    if accepts(model, "position_ids"):
        kwargs["position_ids"] = _positions_in_pictures(model, batch, kwargs)
    if accepts(model, "use_cache"):
        kwargs["use_cache"] = False
    return kwargs


def generation_inputs(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """What ``generate`` takes of a padded batch, which counts positions itself: ids, mask, and pictures if any."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    inputs |= picture_inputs(model, batch.input_ids, batch.pictures() if batch.beside else {})
    return inputs | text_types(model, inputs, [bool(row) for row in batch.beside])


def text_types(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], pictured: Sequence[bool]
) -> dict[str, torch.Tensor]:
    """For PaliGemma, ``token_type_ids`` ``[rows, width]`` in which a text without pictures is of an answer's type.

    It is then read in one direction: without types, whether the model looks ahead would depend on the padding.

    Args:
        model: that reads; nothing is said to any other.
        inputs: ``input_ids``, and types where a row has pictures.
        pictured: of each row, whether it has pictures; empty: none has.
    """
    if _inner(model).config.model_type != "paligemma":
        return {}
    ids = inputs["input_ids"]
    alone = ~torch.tensor(pictured or [False] * len(ids), device=ids.device)
    return {"token_type_ids": inputs.get("token_type_ids", torch.zeros_like(ids)).masked_fill(alone[:, None], 1)}


def decoder_start(model: PreTrainedModel) -> int:
    """The token that the decoder of an encoder-decoder begins with; a model that sees keeps it with its text stack."""
    config = model.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for holder in (config, config.get_text_config(decoder=True), getattr(model, "generation_config", None)):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return 0


def seen_from(model: torch.nn.Module, ids: Sequence[int], position: int) -> int:
    """How many of a row's tokens decide what is read at a position: PaliGemma's tokens see all of their prompt."""
    if isinstance(ids, TokenIds) and _inner(model).config.model_type == "paligemma":
        return max(position + 1, int((ids.beside["token_type_ids"] == 0).sum()))
    return position + 1


def picture_inputs(
    model: PreTrainedModel, input_ids: torch.Tensor, pictures: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a model reads beside a batch of ids, in its dtype: what belongs to pictures, or nothing.

    Args:
        model: that reads.
        input_ids: ``[rows, width]``.
        pictures: of all rows, see `TokenBatch.pictures`.
    """
    if not pictures:
        return _blank(model, input_ids)
    dtype = next(iter(_inner(model).parameters())).dtype
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in pictures.items()}


def image_ids(model: torch.nn.Module) -> set[int]:
    """The token ids that stand for pictures in a text; none of a model of text."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return {i for name in names if isinstance(i := getattr(model.config, name, None), int)}


def _positions_in_pictures(model: PreTrainedModel, batch: TokenBatch, inputs: dict[str, Any]) -> torch.Tensor:
    """Positions as the model counts them: Qwen's models count the rows and columns of a picture, ``[3, rows, width]``.

    They are named even though the model would count by itself, because a replay asks for a part of the columns.
    """
    count = getattr(getattr(_inner(model), "model", None), "get_rope_index", None)
    if not batch.beside or count is None:
        return batch.position_ids
    taken = inspect.signature(count).parameters
    positions: torch.Tensor = count(**{name: value for name, value in inputs.items() if name in taken})[0]
    return positions


def _blank(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """One empty picture for a model whose forward cannot do without (BLIP-2); no token of a text stands for it."""
    kind: Any = type(_inner(model))
    needed = _parameters(kind)
    if "pixel_values" not in needed or needed["pixel_values"].default is not inspect.Parameter.empty:
        return {}
    size, like = model.config.vision_config.image_size, next(iter(_inner(model).parameters()))
    blank = {"pixel_values": like.new_zeros(1, 3, size, size)}
    if "qformer_input_ids" in needed:
        blank["qformer_input_ids"] = input_ids.new_zeros(1, 1)
    return blank


@dataclass(frozen=True)
class Positions:
    """Positions of a padded batch whose logits are wanted, row after row.

    They are laid out on the host, once: a loop that asks for the same positions again uploads nothing. How they are
    handed to a model depends on where it runs. On a CPU a mask gives exactly these positions. An accelerator would
    have to tell the host how many a mask holds, which makes it wait in every forward; there each row asks for as many
    columns as the row that wants most, and what is too much is dropped.

    Args:
        rows: row of each position, ``[n]`` int64.
        columns: column of each position, ``[n]`` int64.
        kept: what ``logits_to_keep`` takes: a mask ``[rows, width]``, or columns ``[rows, k]`` int64.
        places: where each position stands among those that are kept, for the mask ``[n]``, else in its row; int64.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    kept: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, wanted: Sequence[Sequence[int]], inputs: torch.Tensor, *, masked: bool | None = None) -> Positions:
        """Lay out positions.

        Args:
            wanted: the wanted columns of every row.
            inputs: ids of the stack whose logits are meant, ``[…, width]``; the positions come to their device.
            masked: as a mask; ``None``: on a CPU.
        """
        rows = [i for i, row in enumerate(wanted) for _ in row]
        columns = [column for row in wanted for column in row]
        if masked if masked is not None else inputs.device.type == "cpu":
            kept = torch.zeros(len(wanted), inputs.shape[-1], dtype=torch.bool)
            kept[rows, columns] = True
            places = (kept.flatten().cumsum(0) - 1).view_as(kept)[rows, columns]
        else:
            most = max(map(len, wanted))
            filled = [[*row, *[row[-1] if row else 0] * (most - len(row))] for row in wanted]
            kept = torch.tensor(filled, dtype=torch.long)
            places = torch.tensor([place for row in wanted for place in range(len(row))], dtype=torch.long)
        found = (torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long), kept, places)
        return cls(*(tensor.to(inputs.device) for tensor in found))


def gather_logits(model: PreTrainedModel, batch: TokenBatch, positions: Positions, **extra: Any) -> torch.Tensor:
    """Run the model over a padded batch and return the logits at some positions, ``[n, vocab]`` in its dtype."""
    return logits_at(model, {**model_inputs(model, batch), **extra}, positions)


def logits_at(
    model: PreTrainedModel, kwargs: dict[str, Any], positions: Positions, run: Callable[..., Any] | None = None
) -> torch.Tensor:
    """Call the model with ``kwargs`` and return the logits at some positions, ``[n, vocab]``.

    Where the model can, it computes its head there only.

    Args:
        model: a transformers model, or something that is called like one.
        kwargs: of its forward.
        positions: what is wanted.
        run: called instead of the model: its own forward, by those who stand before it.
    """
    run = run or model
    rows, columns, kept, places = vars(positions).values()
    masked = kept.dtype == torch.bool
    width = kwargs["decoder_input_ids" if "decoder_input_ids" in kwargs else "input_ids"].shape[1]
    if accepts(model, "logits_to_keep") and (masked or kept.shape[1] < width):
        with _last_states_brought_back(model) if _is_spread(model) else nullcontext():
            logits = run(**kwargs, logits_to_keep=kept).logits
        if logits.dim() == 2:
            return cast(torch.Tensor, logits[places.to(logits.device)])
        if logits.shape[1] == kept.shape[1] < width:
            return cast(torch.Tensor, logits[rows.to(logits.device), places.to(logits.device)])
    else:
        logits = run(**kwargs).logits
    return cast(torch.Tensor, logits[rows.to(logits.device), columns.to(logits.device)])


def _is_spread(model: Any) -> bool:
    """Whether parts of a model lie on several devices."""
    placed = getattr(_inner(model), "hf_device_map", None)
    return placed is not None and len(set(placed.values())) > 1


def _last_states_brought_back(model: Any) -> Switch[None]:
    """Inside the block, the stacks of a model that is spread over devices return their states where they were asked.

    A model's forward picks the wanted positions from what its last block returns, before the head. accelerate has
    moved everything that the forward was called with to one device, those positions among them, and leaves the states
    on the last block's. Moving them back costs one copy, which accelerate would make at the head at the latest.
    """
    inner = _inner(model)

    def back(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if given is None:
            return None
        if isinstance(output, tuple):
            return replace_block_output(output, output[0].to(given.device))
        if getattr(output, "last_hidden_state", None) is not None:
            output.last_hidden_state = output.last_hidden_state.to(given.device)
        return output

    stacks = [m for m in inner.modules() if isinstance(m, PreTrainedModel) and m is not inner]
    return hooks(*(partial(stack.register_forward_hook, back, with_kwargs=True) for stack in stacks))


def recomputed_blocks(model: PreTrainedModel) -> Switch[None]:
    """Blocks of a model in evaluation mode keep no activations inside; backward passes run them again.

    transformers checkpoints a block only while it is in training mode. The block alone is put into it, and its own
    rates of dropout are zero meanwhile; the modules in it stay in evaluation mode. The backward pass has to be made
    inside the context, and inside every hook that the forward pass ran under.

    Raises:
        ConfigError: if the model's class does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{type(model).__name__} does not support activation_checkpointing; leave it off")
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    rates = [(b, n, v) for b in blocks for n, v in vars(b).items() if "dropout" in n and isinstance(v, float)]
    was_on = model.is_activation_checkpointing

    def change() -> None:
        if not was_on:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # nothing below the first edited module is to be differentiated
        for block in blocks:
            block.training = True
        for block, name, _ in rates:
            setattr(block, name, 0.0)

    def put_back() -> None:
        for block, name, rate in rates:
            setattr(block, name, rate)
        for block in blocks:
            block.training = False
        if not was_on:
            model.activation_checkpointing_disable()

    return switched(change, put_back)


_measuring = threading.local()


def is_measured() -> bool:
    """Whether this thread measures a model, so that nothing may stand between it and the model's own logits."""
    return bool(getattr(_measuring, "depth", 0))


def generating() -> Switch[None]:
    """A block inside `frozen_eval` in which a model answers as it does for people, `decode_with` included."""
    depths: list[int] = []

    def change() -> None:
        depths.append(getattr(_measuring, "depth", 0))
        _measuring.depth = 0

    def put_back() -> None:
        if depths:
            _measuring.depth = depths.pop()

    return switched(change, put_back)


class frozen_eval(alone):
    """Evaluation mode without weight gradients, alone with the model; every flag is put back afterwards.

    What is measured inside are the model's own logits (`is_measured`), but for what is `generating`.

    If the block fails, so are the hooks and torch's gradient mode: whoever sets one of them without a `Switch`
    (``torch.no_grad`` too) may have been interrupted before it took note of it.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        self._model = model
        self._eval: Switch[None] | None = None
        self._trainable: list[torch.nn.Parameter] = []
        self._counted = False

    def change(self) -> None:
        """Wait for other threads, note the hooks, and set the flags."""
        super().change()
        _measuring.depth = getattr(_measuring, "depth", 0) + 1
        self._counted = True
        self._grad, self._hooks = torch.is_grad_enabled(), {id(held): set(held) for held in _hooks(self._model)}
        self._eval = evaluating(self._model)
        self._eval.__enter__()
        self._trainable = [p for p in self._model.parameters() if p.requires_grad]
        for parameter in self._trainable:
            parameter.requires_grad_(False)

    def put_back(self, failed: bool) -> None:
        """Set the flags as they were; take off what hooks are left of a block that failed."""
        if self._counted:
            _measuring.depth -= 1
            self._counted = False
        try:
            if self._eval is not None:
                self._put_back_flags(failed)
                self._eval.__exit__(None, None, None)
        finally:
            super().put_back(failed)

    def _put_back_flags(self, failed: bool) -> None:
        if failed:
            torch.set_grad_enabled(self._grad)
        for held in _hooks(self._model) if failed else ():
            for key in set(held) - self._hooks.get(id(held), set()):
                del held[key]
        for parameter in self._trainable:
            parameter.requires_grad_(True)


def _hooks(model: torch.nn.Module) -> Iterator[dict[int, Any]]:
    """The dictionaries in which the modules keep their hooks, and what these are called with."""
    for module in model.modules():
        yield module._forward_hooks
        yield module._forward_hooks_with_kwargs
        yield module._forward_hooks_always_called
        yield module._forward_pre_hooks
        yield module._forward_pre_hooks_with_kwargs
