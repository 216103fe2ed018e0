"""How files and values are damaged. Everything is drawn from one generator, so that a seed names a case."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hf_kedit.errors import KeditError

LONG = int(os.environ.get("KEDIT_FUZZ", "1000"))
FIRST = int(os.environ.get("KEDIT_FUZZ_SEED", "1000"))

# What stands where something else is expected.
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x",
    "weight", "../../outside", "/etc/hostname", "\ud83d", "\u202e", "a\x00b", "0" * 300, [], [[]], {}, [None], [1, 2],
    ["a", "b"], {"a": 1}, {"": []}, [{"id": 1}], "layers", "float32", "Tensor", "__class__",
)  # fmt: skip


@dataclass
class Tally:
    """What the cases of a fuzzer ended in."""

    refused: int = 0
    worked: int = 0
    wrong: list[str] = field(default_factory=list)

    def fail(self, case: str, problem: str) -> None:
        """Note a case that ended in what it must not."""
        self.wrong.append(f"{case}: {problem}")

    def check(self, least: int = 1) -> None:
        """Nothing went wrong, and the cases were no empty ones."""
        assert not self.wrong, f"{len(self.wrong)} of {self.total} cases:\n" + "\n".join(self.wrong[:20])
        assert self.refused + self.worked >= least

    @property
    def total(self) -> int:
        """Number of cases."""
        return self.refused + self.worked + len(self.wrong)


def attempt(tally: Tally, case: str, call: Callable[[], Any]) -> Any:
    """Run a case; its value, or ``None`` after any exception (which is counted)."""
    try:
        return call()
    except KeditError as error:
        if not str(error).strip():
            tally.fail(case, f"{type(error).__name__} without a message")
        tally.refused += 1
    except Exception as error:
        tally.fail(case, f"{type(error).__name__}: {str(error)[:200]}")
    return None


# ---------------------------------------------------------------------- values


def junk(rng: random.Random) -> Any:
    """Something that is not expected; now and then a deep or a long one."""
    draw = rng.random()
    if draw < 0.03:
        deep: Any = 0
        for _ in range(rng.choice((50, 900, 3000))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if draw < 0.06:
        return rng.choice(("long ", "长", "a\n")) * rng.choice((100, 20_000))
    return copy.deepcopy(rng.choice(JUNK))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a value of JSON kind, the root included."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def mutate(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy with one place changed, and which."""
    value = copy.deepcopy(value)
    path = rng.choice(list(places(value))[1:] or [()])
    if not path:
        return junk(rng), "root"
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    last, kind = path[-1], rng.choice(("replace", "replace", "replace", "delete", "copy", "add", "swap", "type"))
    if kind == "delete":
        del holder[last]
    elif kind == "copy":
        holder[last] = copy.deepcopy(_at(value, rng.choice(list(places(value)))))
    elif kind == "add":
        if isinstance(holder, dict):
            holder[rng.choice(("extra", "", "id", "__proto__", "weights"))] = junk(rng)
        else:
            holder.insert(last, junk(rng))
    elif kind == "swap" and isinstance(holder, dict):
        other = rng.choice(list(holder))
        holder[last], holder[other] = holder[other], holder[last]
    elif kind == "type":
        old = holder[last]
        holder[last] = [old] if rng.random() < 0.5 else {"value": old} if rng.random() < 0.5 else str(old)
    else:
        holder[last] = junk(rng)
    return value, f"{kind} {'.'.join(map(str, path))}"


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        value = value[key]
    return value


def dumps(value: Any) -> bytes:
    """As JSON, whatever it holds: lone surrogates too."""
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 100_000


def damage_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bit flips, truncations, insertions, and texts that parsers stumble over."""
    kind = rng.choice(("flip", "flip", "cut", "cut", "insert", "drop", "empty", "deep", "digits", "noise", "twice"))
    at = rng.randrange(len(data) + 1)
    if kind == "flip" and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :], f"flip at {at}"
    if kind == "cut":
        return data[:at], f"cut at {at}"
    if kind == "insert":
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:], f"insert at {at}"
    if kind == "drop":
        return data[:at] + data[at + rng.randrange(1, 40) :], f"drop at {at}"
    if kind == "deep":
        return rng.choice((b"[", b'{"a":', b"- ")) * rng.choice((1000, 100_000)), "deep"
    if kind == "digits":
        return data[:at] + b"9" * rng.choice((400, 5000)) + data[at:], f"digits at {at}"
    if kind == "noise":
        return rng.randbytes(rng.randrange(200)), "noise"
    if kind == "twice":
        return data + data, "twice"
    return b"", "empty"


# ---------------------------------------------------------------------- files


def damage_json(path: Path, rng: random.Random) -> str:
    """Change one place of a JSON or JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else None
    if lines:
        number = rng.randrange(len(lines))
        changed, what = mutate(json.loads(lines[number]), rng)
        lines[number] = dumps(changed).decode("utf-8", "surrogatepass")
        path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
        return f"line {number}: {what}"
    changed, what = mutate(json.loads(path.read_bytes()), rng)
    path.write_bytes(dumps(changed))
    return what


def damage_tensors(path: Path, rng: random.Random) -> str:
    """Change one tensor of a safetensors file: name, presence, shape, dtype, numbers."""
    tensors = load_file(path)
    if not tensors:
        return "no tensors"
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.choice(("drop", "rename", "scalar", "flat", "wider", "narrower", "turned", "empty", "dtype", "inf",
                       "nan", "huge", "add", "swap", "batch"))  # fmt: skip
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[rng.choice((name + "x", name[1:] or "x", "weight"))] = tensors.pop(name)
    elif kind == "add":
        tensors["nobody.names.this"] = torch.zeros(2)
    elif kind == "swap":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), value.clone()
    elif kind == "dtype":
        tensors[name] = value.to(rng.choice((torch.float16, torch.int64, torch.float64, torch.bool, torch.uint8)))
    elif value.is_floating_point() and kind in ("inf", "nan", "huge"):
        changed = value.clone().reshape(-1)
        if changed.numel():
            number = {"inf": float("inf"), "nan": float("nan"), "huge": torch.finfo(value.dtype).max}[kind]
            changed[:] = number if rng.random() < 0.5 else changed
            changed[rng.randrange(changed.numel())] = number
        tensors[name] = changed.reshape(value.shape)
    else:
        tensors[name] = {
            "scalar": lambda: value.reshape(-1)[:1].reshape(()) if value.numel() else value.new_zeros(()),
            "flat": lambda: value.reshape(-1),
            "wider": lambda: torch.cat([value, value], -1) if value.dim() else value.reshape(1),
            "narrower": lambda: value[..., : max(0, value.shape[-1] - 1)] if value.dim() else value.reshape(1),
            "turned": lambda: value.transpose(0, -1) if value.dim() else value,
            "empty": lambda: value.new_zeros(0),
        }.get(kind, lambda: value.unsqueeze(0))().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{kind} {name}"


def damage_folder(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder, or which files it has; says what was done."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    short = str(path.relative_to(folder))
    kind = rng.choice(
        ("bytes", "bytes", "json", "json", "json", "tensors", "missing", "extra", "folder", "link", "swap")
    )
    if kind == "json" and path.suffix in (".json", ".jsonl"):
        return f"{short}: {damage_json(path, rng)}"
    if kind == "tensors" and path.suffix == ".safetensors":
        return f"{short}: {damage_tensors(path, rng)}"
    if kind == "missing":
        path.unlink()
    elif kind == "extra":
        (
            folder / rng.choice(("model.safetensors", "adapter_model.bin", "extra.txt", "pytorch_model.bin"))
        ).write_bytes(b"x")
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "link":
        path.unlink()
        path.symlink_to(rng.choice(("/nowhere", "/etc", str(path))))
    elif kind == "swap":
        other = rng.choice(files)
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
        return f"swap {short} {other.relative_to(folder)}"
    else:
        damaged, what = damage_bytes(path.read_bytes(), rng)
        path.write_bytes(damaged)
        return f"{short}: {what}"
    return f"{kind} {short}"
