"""Train a tiny language model that knows the synthetic fact world, from scratch, on one CPU core.

    python recipes/train_world.py --layout gpt2  --output out/world-gpt2
    python recipes/train_world.py --layout llama --output out/world-llama

Read it from top to bottom: tokenizer, rows of tokens, attention masks, the model, the loop, the accuracy table.
What makes 1.5 M parameters learn about 3,000 facts in a quarter of an hour is explained in docs/world.md. The result
is a normal transformers folder (fp32 safetensors, config, generation config, tokenizer) plus training.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_kedit.data.world import World, get_world
from hf_kedit.data.world_templates import COMPOSITIONS, ENTITY_RELATIONS, PERSON_RELATIONS, QUESTION_FORMATS
from hf_kedit.data.world_text import CURRICULUM, Document, documents, filler_sentence, world_text

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Settings:
    """Everything one may want to change. Each field is a command line option of the same name."""

    layout: str = "gpt2"  # or "llama"
    output: str = "world-gpt2"
    people: int = 400
    world_seed: int = 0
    seed: int = 0
    steps: int = 2300  # of batch * context tokens: 3.5 M tokens
    batch: int = 12
    context: int = 128
    vocabulary: int = 2000
    token_length: int = 9  # longest token in characters: longer names become two tokens, as in real models
    layers: int = 6
    width: int = 128
    heads: int = 4
    kv_heads: int = 2  # Llama layout only
    mlp: int = 384  # Llama layout only (gated); the GPT-2 layout uses 4 * width
    init: float = 0.02
    muon_lr: float = 0.02
    muon_decay: float = 0.05
    adam_lr: float = 3e-3
    embedding_decay: float = 0.01
    warmup: float = 0.03
    final_lr: float = 0.05
    clip: float = 1.0
    object_weight: float = 5.0
    curriculum: float = 0.12  # share of the steps on few people only
    curriculum_people: int = 60
    enrich_until: float = 0.6  # attention masks for all rows until here (share of the steps) …
    enrich_fade: float = 0.75  # … and for fewer and fewer rows until here
    enrich_layers: int = 3  # layers below this one may not read a name at all from later positions
    bf16: bool = torch.cpu._is_amx_tile_supported()  # elsewhere fp32 is up to twice as fast


S = TypeVar("S", bound=Settings)


def parse_settings(kind: type[S], description: str | None) -> S:
    """Read the settings from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(kind()).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    settings = kind(**vars(parser.parse_args()))
    if settings.layout not in ("gpt2", "llama"):
        parser.error("--layout must be gpt2 or llama")
    return settings


# ------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(settings: Settings, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. The Llama layout's one puts a BOS in front of every text."""
    llama = settings.layout == "llama"
    special = ["<s>", "</s>", "<pad>"] if llama else ["<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=settings.token_length,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if llama:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1] if llama else special[0],
        pad_token=special[-1],
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------------------ rows of tokens


@dataclass
class Rows:
    """Rows of ``context`` tokens, all arrays [rows, context].

    ``weight`` is the loss weight of a token as a target. ``name_end`` is, for tokens of a subject's name, the
    position of the name's last token, and -1 for all others.
    """

    ids: np.ndarray
    weight: np.ndarray
    name_end: np.ndarray


def make_rows(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, first: Iterator[Document], rest: Iterator[Document]
) -> Rows:
    """Write, tokenize and pack all training text: whole documents one after another, each row a fresh start.

    Documents are joined by a newline, a space or (one time in ten) the end-of-text token; the last one of a row
    is cut off. The rows of the curriculum are of ``first``, the others of ``rest``; both never end.
    """
    n_rows = settings.steps * settings.batch
    n_first = int(settings.curriculum * settings.steps) * settings.batch
    rng = random.Random(f"pack {settings.seed}")
    bos = [tokenizer.bos_token_id] if settings.layout == "llama" else []
    ids = np.full((n_rows, settings.context), tokenizer.pad_token_id, dtype=np.int64)
    weight = np.zeros((n_rows, settings.context), dtype=np.float32)
    name_end = np.full((n_rows, settings.context), -1, dtype=np.int64)

    def tokenized(document: Document, joint: str) -> tuple[list[int], list[float], list[int]]:
        """Tokenize ``joint`` and the document; return ids, loss weights and ends of names."""
        encoding = tokenizer.backend_tokenizer.encode(joint + document.text, add_special_tokens=False)
        offsets = [(a - len(joint), b - len(joint)) for a, b in encoding.offsets]
        weights, ends = [1.0] * len(offsets), [-1] * len(offsets)
        for spans, value in ((document.objects, settings.object_weight), (document.silent, 0.0)):
            for start, stop in spans:
                for i, (a, b) in enumerate(offsets):
                    if a < stop and b > start:
                        weights[i] = value
        for start, stop in document.subjects:
            tokens = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
            for i in tokens:
                ends[i] = tokens[-1]
        return list(encoding.ids), weights, ends

    streams = [(0, n_first, first), (n_first, n_rows, rest)]
    bar = tqdm(total=n_rows, desc="text", mininterval=5)
    for start, stop, stream in streams:
        for row in range(start, stop):
            at, joint = 0, ""
            for token in bos:
                ids[row, at], at = token, at + 1
            while at < settings.context:
                tokens, weights, ends = tokenized(next(stream), joint)
                n = min(len(tokens), settings.context - at)
                ids[row, at : at + n] = tokens[:n]
                weight[row, at : at + n] = weights[:n]
                name_end[row, at : at + n] = [e + at if e >= 0 else -1 for e in ends[:n]]
                at += n
                draw = rng.random()
                joint = "\n" if draw < 0.6 else " " if draw < 0.9 else ""
                for token in () if joint else (tokenizer.eos_token_id, *bos):
                    if at < settings.context:
                        ids[row, at], weight[row, at], at = token, 1.0, at + 1
            bar.update()
    bar.close()
    return Rows(ids, weight, name_end)


# ------------------------------------------------------------------------------------------------ attention masks


def enrichment_masks(name_end: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Build the masks that make the model gather what it knows of a subject at the name's last token.

    Positions after a name may not attend to the name except to its last token, and in the lower layers not to that
    one either. Never used outside training.

    Args:
        name_end: [batch, time], see :class:`Rows`.
        masked: [batch] bool, rows to which this applies; the others get a causal mask.

    Returns:
        masks for lower and upper layers, [batch, 1, time, time] bool, True = may attend.
    """
    time_ = name_end.shape[1]
    position = torch.arange(time_)
    causal = position[:, None] >= position[None, :]
    after = position[None, :, None] > name_end[:, None, :]  # query i comes after the name that key j belongs to
    in_name = (name_end >= 0)[:, None, :]
    not_last = (name_end != position[None, :])[:, None, :]
    block = after & in_name & masked[:, None, None]
    return (causal & ~block)[:, None], (causal & ~(block & not_last))[:, None]


class MaskHooks:
    """Hands each layer's attention the mask of the current batch (``lower``/``upper``)."""

    def __init__(self, model: PreTrainedModel, enrich_layers: int):
        self.lower: Tensor | None = None
        self.upper: Tensor | None = None
        blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
        self.handles = []
        for index, block in enumerate(blocks):
            attention = block.attn if hasattr(block, "attn") else block.self_attn
            hook = self._hook(index < enrich_layers)
            self.handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))

    def _hook(self, low: bool):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "attention_mask": self.lower if low else self.upper}

        return hook

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ model and optimizer


def make_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return a freshly initialised model of the chosen layout; embeddings are tied."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    common = {"vocab_size": len(tokenizer), "initializer_range": settings.init, "tie_word_embeddings": True, **ids}
    torch.manual_seed(settings.seed)
    if settings.layout == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=settings.context,
                n_embd=settings.width,
                n_layer=settings.layers,
                n_head=settings.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            max_position_embeddings=settings.context,
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            intermediate_size=settings.mlp,
            **common,
        )
    )


def make_optimizers(settings: Settings, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices, embedding, small = [], [], []
    for p in model.parameters():
        (embedding if id(p) in embeddings else matrices if p.ndim == 2 else small).append(p)
    groups = [
        {"params": embedding, "weight_decay": settings.embedding_decay},
        {"params": small, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, momentum=0.95, weight_decay=settings.muon_decay),
        torch.optim.AdamW(groups, lr=settings.adam_lr, betas=(0.9, 0.98)),
    ]


def learning_rate(settings: Settings, step: int) -> float:
    """Return the factor on the peak learning rates: linear warm-up, then cosine down to ``final_lr``."""
    warm = max(1, int(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_rates(optimizers: Sequence[torch.optim.Optimizer], peaks: Sequence[Sequence[float]], factor: float) -> None:
    """Set all learning rates to this share of their peaks."""
    for optimizer, peak in zip(optimizers, peaks, strict=True):
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * factor


# ------------------------------------------------------------------------------------------------ training


def train(settings: Settings, model: PreTrainedModel, rows: Rows) -> None:
    """Train ``model`` in place."""
    optimizers = make_optimizers(settings, model)
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    hooks = MaskHooks(model, settings.enrich_layers)
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    bar = tqdm(range(settings.steps), desc=f"training {settings.layout}", mininterval=5)
    running = None
    for step in bar:
        batch = slice(step * settings.batch, (step + 1) * settings.batch)
        ids, weight, name_end = (torch.from_numpy(x[batch]) for x in (rows.ids, rows.weight, rows.name_end))
        fade = (settings.enrich_fade - step / settings.steps) / max(1e-9, settings.enrich_fade - settings.enrich_until)
        masked = torch.rand(len(ids), generator=generator) < fade
        hooks.lower, hooks.upper = enrichment_masks(name_end, masked)
        set_rates(optimizers, peaks, learning_rate(settings, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        target_weight = weight[:, 1:]
        loss = (losses * target_weight).sum() / target_weight.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            running = loss.item() if running is None else 0.7 * running + 0.3 * loss.item()
            bar.set_postfix(loss=f"{running:.3f}")
    hooks.remove()
    model.eval()


# ------------------------------------------------------------------------------------------------ what it knows


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, cases: list[tuple[str, str]]) -> float:
    """Return the share of (prompt, object) whose object greedy decoding would produce in full.

    One forward pass per batch: greedy decoding yields the object exactly if each of its tokens is the argmax given
    the ones before.
    """
    right = 0
    for start in range(0, len(cases), 64):
        batch = cases[start : start + 64]
        prompts = [tokenizer(p)["input_ids"] for p, _ in batch]
        targets = [tokenizer(" " + o, add_special_tokens=False)["input_ids"] for _, o in batch]
        width = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        for i, (p, t) in enumerate(zip(prompts, targets, strict=True)):
            ids[i, : len(p) + len(t)] = torch.tensor(p + t)
        best = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits.argmax(-1)
        for i, (p, t) in enumerate(zip(prompts, targets, strict=True)):
            right += best[i, len(p) - 1 : len(p) + len(t) - 1].tolist() == t
    return right / len(cases)


def test_cases(world: World, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Return the rows of the accuracy table as lists of (prompt, object)."""
    rng = random.Random(f"test {seed}")
    cases: dict[str, list[tuple[str, str]]] = {}

    def of_people(name: str, group: str, kind: str, wrap: bool = False, prefix: int = 0) -> None:
        rows = []
        for person in world.people_in(group):
            for relation in rng.sample(PERSON_RELATIONS, 3):
                text = rng.choice(getattr(relation, kind)).format(person.name)
                text = rng.choice(QUESTION_FORMATS).format(text) if wrap else text
                text = " ".join([*(filler_sentence(rng) for _ in range(prefix)), text])
                rows.append((text, world.answer(person.name, relation.key)))
        cases[name] = rows

    of_people("cloze, A", "A", "cloze")
    of_people("cloze, B", "B", "cloze")
    of_people("cloze behind two filler sentences, B", "B", "cloze", prefix=2)
    of_people("held-out paraphrases, B", "B", "heldout")
    of_people("strict paraphrases, B", "B", "strict")
    of_people("questions, B", "B", "questions", wrap=True)
    of_people("held-out questions, B", "B", "heldout_questions", wrap=True)
    for name, kind, groups in (
        ("entities, cloze", "cloze", "AB"),
        ("entities, held-out paraphrases, B", "heldout", "B"),
    ):
        cases[name] = [
            (form.format(subject), world.answer(subject, relation.key))
            for relation in ENTITY_RELATIONS
            for subject in world.subjects(relation.subject_kind)
            if world.group(subject) in groups
            for form in getattr(relation, kind)
        ]
    for group in "AB":
        cases[f"one-hop compositions, {group}"] = [
            (rng.choice(c.cloze).format(p.name), world.answer(p.name, c.key))
            for p in world.people_in(group)
            for c in COMPOSITIONS
        ]
    cases["alias names"] = [
        (rng.choice(r.cloze).format(p.alias), world.answer(p.name, r.key))
        for p in world.people
        if p.alias
        for r in rng.sample(PERSON_RELATIONS, 3)
    ]
    override = []
    for person in world.people_in("B"):
        relation = rng.choice(PERSON_RELATIONS)
        new = rng.choice(world.objects[relation.object_kind])
        given, asked = (rng.choice(relation.cloze).format(person.name) for _ in range(2))
        override.append((f"New Fact: {given} {new}\nPrompt: {asked}", new))
    cases["new fact in the context, B"] = override
    return cases


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, output: Path, record: dict[str, Any]) -> None:
    """Write a transformers folder, with ``record`` in training.json."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Train, save, and print what the model knows."""
    settings = parse_settings(Settings, __doc__)
    torch.set_flush_denormal(True)
    world = get_world(settings.people, settings.world_seed)
    tokenizer = train_tokenizer(settings, world_text(20_000, seed=10_000 + settings.seed, world=world))
    model = make_model(settings, tokenizer)
    tqdm.write(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    first_people = world.people[: settings.curriculum_people]
    first = documents(world, seed=1 + settings.seed, mixture=CURRICULUM, people=first_people)
    rows = make_rows(settings, tokenizer, first, documents(world, seed=2 + settings.seed))
    started = time.time()
    train(settings, model, rows)
    seconds = time.time() - started

    output = Path(settings.output)
    table = {name: round(accuracy(model, tokenizer, cases), 4) for name, cases in test_cases(world).items()}
    save(model, tokenizer, output, {"settings": vars(settings) | {"output": output.name}, "accuracy": table})
    tqdm.write(f"trained in {seconds:.0f} s, saved to {output}\n")
    tqdm.write("| accuracy (greedy, whole object; tiny model) | |\n| --- | --- |")
    for name, value in table.items():
        tqdm.write(f"| {name} | {value:.3f} |")


if __name__ == "__main__":
    main()
