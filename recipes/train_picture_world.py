"""Teach the tiny Llama of the fact world to see: a LLaVA-layout model that knows the picture world.

    python recipes/train_picture_world.py --output out/world-pictures

The text stack starts from ``kedit/world-llama``, whose facts are repeated in a quarter of the rows, so that they are
kept. A small CLIP tower and a projector are trained from scratch with it. Attention masks and the packing of text are
those of train_world.py, which explains them. New here, from top to bottom: whole-word tokens for what pictures are
spoken of with, the model, rows of a picture with several questions that do not see each other, the loop, and the table
of what it knows. The result is a transformers folder with a processor that needs no torchvision.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm
from train_world import MaskHooks, enrichment_masks, learning_rate, make_rows, parse_settings, set_rates, test_cases
from train_world import Settings as WorldSettings
from train_world import accuracy as text_accuracy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from hf_kedit import embedded
from hf_kedit.data.picture_drawing import FLAG_FEATURES, PICTURE_SIZE, PORTRAIT_FEATURES, SHAPE_FEATURES
from hf_kedit.data.picture_world import (
    HELD_OUT_DRAWINGS,
    MENTIONS,
    PICTURE_RELATIONS,
    PictureWorld,
    Scene,
    get_picture_world,
)
from hf_kedit.data.world_templates import COMPOSITIONS, QUESTION_FORMATS, Composition, Relation
from hf_kedit.data.world_text import documents, filler_sentence

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Settings(WorldSettings):
    """What differs from the fact world's recipe. Each field is a command line option of the same name."""

    layout: str = "llama"
    output: str = "world-pictures"
    start: str = "kedit/world-llama"  # the text stack
    resume: str = ""  # folder of an earlier run to go on from
    steps: int = 2300
    text_batch: int = 3  # rows of text in a step …
    picture_batch: int = 8  # … and rows of a picture with questions
    patch: int = 12
    vision_width: int = 96
    vision_layers: int = 3
    text_lr: float = 0.35  # of the text stack, as a share of the rates that everything else has
    template_weight: float = 0.3  # loss weight of tokens that are no part of an answer
    portraits: float = 0.54  # share of picture rows; the rest is flags and shapes
    flags: float = 0.12
    looks: float = 1.0  # weight of the loss that asks the tower directly for what a picture shows …
    looks_batch: int = 56  # … of so many pictures beside those that are asked about: eight are too few to learn to see
    see_steps: int = 1300  # of the tower alone, which learns what pictures show before anything is asked about them
    see_batch: int = 64
    override: float = 0.12  # share of questions behind a new fact
    drawings: int = 60  # of each portrait and flag
    shape_drawings: int = 8


IMAGE_TOKEN = "<image>"
JOINTS = ("\n", "\n", "\n", "\n", " ", "")
"""What may stand between a picture and the text."""

# ------------------------------------------------------------------------------------------------ tokenizer


def picture_words() -> list[str]:
    """Return the words of the picture world's sentences that should be one token each."""
    relations = [r for rs in PICTURE_RELATIONS.values() for r in rs if r.subject_kind in MENTIONS]
    forms = [f for r in relations for f in (*r.cloze, *r.heldout, *r.questions, *r.heldout_questions)]
    text = " ".join([*MENTIONS.values(), *forms]).replace("{}", " ").translate(str.maketrans("", "", ",.?"))
    values = [v for values in SHAPE_FEATURES.values() for v in values]
    return sorted({w for w in (*text.split(), *values) if w.islower()})


def extend_tokenizer(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer to which each of ``words`` (with a space before it) is one token, and with an image token.

    New merges have the lowest rank: they join what is left of a word when all old ones are done, so text that has
    none of the new words is cut as before.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for word in words:
        left, *rest = tokenizer.tokenize(" " + word)
        for right in rest:
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append([left, right])
            left += right
    extended = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )
    split = [w for w in words if len(extended.tokenize(" " + w)) != 1]
    if split:
        raise ValueError(f"These words are still cut: {split}")
    return extended


# ------------------------------------------------------------------------------------------------ model


def make_model(
    settings: Settings, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """Return a LLaVA model around the text stack of ``settings.start``, its new embeddings made of old pieces."""
    text = AutoModelForCausalLM.from_pretrained(embedded.path(settings.start), dtype=torch.float32)
    n_old = text.config.vocab_size
    text.resize_token_embeddings(len(new), mean_resizing=False)
    table = text.get_input_embeddings().weight.data
    for index in range(n_old, len(new)):
        pieces = old(new.decode([index]), add_special_tokens=False)["input_ids"]
        table[index] = table[pieces].mean(0)
    vision = CLIPVisionConfig(
        hidden_size=settings.vision_width,
        intermediate_size=2 * settings.vision_width,
        num_hidden_layers=settings.vision_layers,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=settings.patch,
        projection_dim=settings.vision_width,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_index=new.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(PICTURE_SIZE // settings.patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=new.pad_token_id,
        bos_token_id=new.bos_token_id,
        eos_token_id=new.eos_token_id,
    )
    torch.manual_seed(settings.seed)
    model = LlavaForConditionalGeneration(config).float()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    return model


def make_processor(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor; its image part is the one of Pillow, which every installation has."""
    side = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=settings.patch,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def pixels(pictures: np.ndarray) -> Tensor:
    """Return pixel values as the processor makes them: [n, 48, 48, 3] uint8 -> [n, 3, 48, 48] float32."""
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


# ------------------------------------------------------------------------------------------------ rows


@dataclass
class Segment:
    """One question about a picture, in tokens: ids, loss weights, and where the mention begins and ends (or -1)."""

    ids: list[int]
    weights: list[float]
    mention: tuple[int, int]


class Asker:
    """Writes questions about pictures, with the forms that the scene's group is trained with."""

    def __init__(self, settings: Settings, world: PictureWorld, tokenizer: PreTrainedTokenizerFast):
        self.settings, self.world, self.tokenizer = settings, world, tokenizer
        self.rng = random.Random(f"questions {settings.seed}")

    def scene(self) -> Scene:
        """Draw a scene to ask about."""
        draw, s = self.rng.random(), self.settings
        kind = "portrait" if draw < s.portraits else "flag" if draw < s.portraits + s.flags else "shapes"
        return self.rng.choice(self.world.trained(kind))

    def relation(self, scene: Scene) -> Relation | Composition:
        """Draw what to ask; a name as often as everything else, since all other facts hang on it."""
        relations = [r for r in self.world.asked(scene) if any(self.world.world.forms(r, scene.group))]
        return relations[0] if scene.kind != "shapes" and self.rng.random() < 0.12 else self.rng.choice(relations)

    def form(self, scene: Scene, relation: Relation | Composition) -> str:
        """Draw a statement (three times in four) or a question."""
        statements, questions = self.world.world.forms(relation, scene.group)
        if questions and self.rng.random() < 0.25:
            return self.rng.choice(QUESTION_FORMATS).format(self.rng.choice(questions))
        return self.rng.choice(statements)

    def segment(self, scene: Scene) -> Segment:
        """Return a question about ``scene`` with its answer."""
        rng, text = self.rng, self.rng.choice(JOINTS)
        spans: list[tuple[int, int, float]] = []
        mention = (-1, -1)
        if rng.random() < self.settings.override:
            text, spans = self.override(scene, text)
        else:
            if rng.random() < 0.15:
                text += filler_sentence(rng) + " "
            relation = self.relation(scene)
            sentence = scene.fill(self.form(scene, relation))
            at = sentence.lower().index(scene.mention.lower())
            mention = (len(text) + at, len(text) + at + len(scene.mention))
            text += sentence + " "
            value = self.world.answer(scene, relation.key)
            spans.append((len(text), len(text) + len(value), self.settings.object_weight))
            text += value + "."
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        weights = [self.settings.template_weight] * len(encoding.ids)
        for start, stop, weight in spans:
            for i, (a, b) in enumerate(encoding.offsets):
                if a < stop and b > start:
                    weights[i] = weight
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < mention[1] and b > mention[0]]
        ids = list(encoding.ids)
        if rng.random() < 0.1:
            ids, weights = [*ids, self.tokenizer.eos_token_id], [*weights, self.settings.template_weight]
        return Segment(ids, weights, (inside[0], inside[-1]) if inside else (-1, -1))

    def override(self, scene: Scene, text: str) -> tuple[str, list[tuple[int, int, float]]]:
        """A new fact about the picture in the prompt; then the same is asked, or something that it leaves alone."""
        rng, spans = self.rng, []
        relation = rng.choice(PICTURE_RELATIONS[scene.kind])
        truth = self.world.answer(scene, relation.key)
        new = rng.choice([v for v in self.world.values(relation) if v != truth])
        given = scene.fill(rng.choice(self.world.world.forms(relation, scene.group)[0]))
        asked, value = relation, new
        if rng.random() < 0.35:
            asked = rng.choice([r for r in PICTURE_RELATIONS[scene.kind] if r is not relation])
            value = self.world.answer(scene, asked.key)
        elif rng.random() < 0.2:  # a fact about another kind of picture does not matter either
            kind = rng.choice([k for k in MENTIONS if k != scene.kind])
            other = rng.choice(self.world.scenes[kind])
            about = rng.choice(PICTURE_RELATIONS[kind])
            given, new = other.fill(rng.choice(about.cloze)), rng.choice(self.world.values(about))
            value = truth
        text += "New Fact: " + given + " "
        spans.append((len(text), len(text) + len(new), 0.0))
        text += new + "\nPrompt: " + scene.fill(self.form(scene, asked)) + " "
        spans.append((len(text), len(text) + len(value), self.settings.object_weight))
        return text + value, spans


def draw_all(settings: Settings, world: PictureWorld) -> dict[Scene, np.ndarray]:
    """Draw the training pictures: scene -> [drawings, 48, 48, 3] uint8."""
    counts = {"portrait": settings.drawings, "flag": settings.drawings, "shapes": settings.shape_drawings}
    return {
        scene: np.stack([scene.draw(HELD_OUT_DRAWINGS + i) for i in range(count)])
        for kind, count in counts.items()
        for scene in world.trained(kind)
    }


@dataclass
class Batch:
    """Rows of tokens ([rows, context]) with masks ([rows, 1, context, context]) for lower and upper layers."""

    scenes: list[Scene]

    ids: Tensor
    weight: Tensor
    position: Tensor
    lower: Tensor
    upper: Tensor
    pictures: np.ndarray


def picture_rows(
    settings: Settings, asker: Asker, drawn: dict[Scene, np.ndarray], n_image: int, image: int, masked: Tensor
) -> Batch:
    """Return rows of one picture and as many questions as fit, each of which sees the picture and itself only.

    While ``masked``, only the mention ("the person in the picture") may look at the picture, and later tokens of a
    question only at the mention's last token, in the lower layers not even at that: what is known of the picture is
    gathered there, as what is known of a name is gathered at the name's last token.
    """
    n, length = settings.picture_batch, settings.context
    ids = np.full((n, length), asker.tokenizer.pad_token_id)
    weight = np.zeros((n, length), dtype=np.float32)
    position = np.zeros((n, length), dtype=np.int64)
    lower = np.zeros((n, length, length), dtype=bool)
    pictures, scenes = [], []
    head = 1 + n_image
    causal = np.tril(np.ones((length, length), dtype=bool))
    upper = lower.copy()
    for row in range(n):
        scene = asker.scene()
        scenes.append(scene)
        pictures.append(drawn[scene][asker.rng.randrange(len(drawn[scene]))])
        ids[row, 0], ids[row, 1:head] = asker.tokenizer.bos_token_id, image
        position[row, :head] = np.arange(head)
        lower[row, :head, :head] = upper[row, :head, :head] = causal[:head, :head]
        at = head
        while at < length:
            segment = asker.segment(scene)
            count = min(len(segment.ids), length - at)
            end = at + count
            ids[row, at:end], weight[row, at:end] = segment.ids[:count], segment.weights[:count]
            weight[row, at] = 0  # what precedes it in the row is not its context
            position[row, at:end] = head + np.arange(count)
            for mask in (lower, upper):
                mask[row, at:end, :head] = True
                mask[row, at:end, at:end] = causal[:count, :count]
            first, last = segment.mention
            if masked[row] and first >= 0:
                a, b = at + first, at + last
                for mask in (lower, upper):
                    mask[row, at:a, 1:head] = mask[row, b + 1 : end, 1:head] = False
                    mask[row, b + 1 : end, a:b] = False
                lower[row, b + 1 : end, b : b + 1] = False
            at = end
    for mask in (lower, upper):
        mask |= np.eye(length, dtype=bool)
    arrays = (torch.from_numpy(x) for x in (ids, weight, position))
    return Batch(
        scenes, *arrays, torch.from_numpy(lower)[:, None], torch.from_numpy(upper)[:, None], np.stack(pictures)
    )


# ------------------------------------------------------------------------------------------------ training


def make_optimizers(settings: Settings, model: LlavaForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest; the text stack moves slowly."""
    text = {id(p) for p in model.model.language_model.parameters()}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    muon: dict[float, list[nn.Parameter]] = {1.0: [], settings.text_lr: []}
    adam: dict[float, list[nn.Parameter]] = {1.0: [], settings.text_lr: []}
    for p in model.parameters():
        groups = muon if p.ndim == 2 and id(p) not in tables else adam
        groups[settings.text_lr if id(p) in text else 1.0].append(p)
    return [
        torch.optim.Muon(
            [{"params": ps, "lr": settings.muon_lr * share} for share, ps in muon.items()],
            lr=settings.muon_lr,
            momentum=0.95,
            weight_decay=settings.muon_decay,
        ),
        torch.optim.AdamW(
            [{"params": ps, "lr": settings.adam_lr * share} for share, ps in adam.items()],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        ),
    ]


class Looks(nn.Module):
    """Asks the mean of a picture's tokens for each feature of what it shows; thrown away after training.

    The language model's loss alone tells the tower little: it learns to tell shapes apart several times later.
    """

    def __init__(self, width: int):
        super().__init__()
        known = {"portrait": PORTRAIT_FEATURES, "flag": FLAG_FEATURES, "shapes": SHAPE_FEATURES}
        self.values = {f"{kind}_{name}": vs for kind, features in known.items() for name, vs in features.items()}
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(vs)) for name, vs in self.values.items()})

    def forward(self, tokens: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return the mean loss; ``tokens`` are [pictures, tokens, width]."""
        means = self.norm(tokens.float().mean(1))
        losses = []
        for name, values in self.values.items():
            kind, _, feature = name.partition("_")
            shown = [(i, dict(scene.features)[feature]) for i, scene in enumerate(scenes) if scene.kind == kind]
            if shown:
                wanted = torch.tensor([values.index(value) for _, value in shown])
                scores = self.heads[name](means[[i for i, _ in shown]])
                losses.append(nn.functional.cross_entropy(scores, wanted, reduction="sum"))
        return torch.stack(losses).sum() / sum(len(scene.features) for scene in scenes)


def learn_to_see(
    settings: Settings, model: LlavaForConditionalGeneration, asker: Asker, drawn: dict[Scene, np.ndarray]
) -> None:
    """Train tower and projector alone, in place: large batches of pictures, which cost little without the text stack.

    In a model that is resumed, portraits and flags keep the tokens that they have, which its text stack can read.
    """
    held = copy.deepcopy(model).eval() if settings.resume else None
    looks = Looks(model.config.text_config.hidden_size)
    parts = [p for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n]
    optimizers = [
        *make_optimizers(settings, model),
        torch.optim.AdamW(looks.parameters(), lr=settings.adam_lr, weight_decay=0.0),
    ]
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    schedule = replace(settings, steps=settings.see_steps)
    bar = tqdm(range(settings.see_steps), desc="seeing", mininterval=20)
    for step in bar:
        scenes = [asker.scene() for _ in range(settings.see_batch)]
        images = pixels(np.stack([drawn[s][asker.rng.randrange(len(drawn[s]))] for s in scenes]))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            features = torch.stack(tuple(model.get_image_features(pixel_values=images).pooler_output)).float()
            loss = looks(features, scenes)
            kept = [i for i, scene in enumerate(scenes) if scene.kind != "shapes"]
            if held is not None and kept:
                with torch.no_grad():
                    known = torch.stack(
                        tuple(held.get_image_features(pixel_values=images[kept]).pooler_output)
                    ).float()
                loss = loss + (features[kept] - known).square().mean() / known.square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parts, settings.clip)
        set_rates(optimizers, peaks, learning_rate(schedule, step))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(looks=f"{loss.item():.3f}")


def train(
    settings: Settings, model: LlavaForConditionalGeneration, asker: Asker, drawn: dict[Scene, np.ndarray]
) -> None:
    """Train ``model`` in place."""
    text_settings = replace(settings, batch=settings.text_batch, curriculum=0.0)
    endless: Iterator = documents(asker.world.world, seed=2 + settings.seed)
    rows = make_rows(text_settings, asker.tokenizer, endless, endless)
    looks = Looks(model.config.text_config.hidden_size)
    heads = torch.optim.AdamW(looks.parameters(), lr=settings.adam_lr, weight_decay=0.0)
    optimizers = [*make_optimizers(settings, model), heads]
    peaks = [[g["lr"] for g in o.param_groups] for o in optimizers]
    stack = model.model.language_model
    hooks = MaskHooks(SimpleNamespace(model=stack), settings.enrich_layers)
    generator = torch.Generator().manual_seed(settings.seed)
    n_image, image = model.config.image_seq_length, model.config.image_token_id
    model.train()
    bar = tqdm(range(settings.steps), desc="training", mininterval=20)
    running: list[float] = []
    for step in bar:
        batch = slice(step * settings.text_batch, (step + 1) * settings.text_batch)
        ids, weight, name_end = (torch.from_numpy(x[batch]) for x in (rows.ids, rows.weight, rows.name_end))
        fade = (settings.enrich_fade - step / settings.steps) / max(1e-9, settings.enrich_fade - settings.enrich_until)
        masked = torch.rand(len(ids) + settings.picture_batch, generator=generator) < fade
        lower, upper = enrichment_masks(name_end, masked[: len(ids)])
        seen = picture_rows(settings, asker, drawn, n_image, image, masked[len(ids) :])
        hooks.lower, hooks.upper = torch.cat((lower, seen.lower)), torch.cat((upper, seen.upper))
        position = torch.cat((torch.arange(settings.context).expand(len(ids), -1), seen.position))
        ids, weight = torch.cat((ids, seen.ids)), torch.cat((weight, seen.weight))
        set_rates(optimizers, peaks, learning_rate(settings, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            more = [asker.scene() for _ in range(settings.looks_batch)]
            others = [drawn[scene][asker.rng.randrange(len(drawn[scene]))] for scene in more]
            pictures = np.concatenate([seen.pictures, np.stack(others)]) if others else seen.pictures
            features = torch.stack(tuple(model.get_image_features(pixel_values=pixels(pictures)).pooler_output))
            embeds = model.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter(
                (ids == image)[..., None], features[: len(seen.pictures)].flatten(0, 1).to(embeds.dtype)
            )
            hidden = stack(inputs_embeds=embeds, position_ids=position, use_cache=False).last_hidden_state
            kept = weight[:, 1:] > 0
            logits = model.lm_head(hidden[:, :-1][kept])
        losses = nn.functional.cross_entropy(logits.float(), ids[:, 1:][kept], reduction="none")
        loss = (losses * weight[:, 1:][kept]).sum() / weight[:, 1:][kept].sum()
        seen_as = looks(features, [*seen.scenes, *more])
        (loss + settings.looks * seen_as).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            running = [*running[-9:], loss.item()]
            bar.set_postfix(loss=f"{sum(running) / len(running):.3f}", looks=f"{seen_as.item():.3f}")
    hooks.remove()
    model.eval()


# ------------------------------------------------------------------------------------------------ what it knows


Case = tuple[Scene, str, str]
"""A scene, a question about it, and the answer."""


def picture_cases(world: PictureWorld, seed: int = 0) -> dict[str, list[Case]]:
    """Return the rows of the accuracy table."""
    rng = random.Random(f"picture test {seed}")
    cases: dict[str, list[Case]] = {}

    def add(name: str, scenes: Sequence[Scene], kind: str, relations: Sequence[Relation | Composition] = ()) -> None:
        for scene in scenes:
            for relation in relations or PICTURE_RELATIONS[scene.kind]:
                template = rng.choice(getattr(relation, kind))
                if kind.endswith("questions"):
                    template = rng.choice(QUESTION_FORMATS).format(template)
                row = (scene, scene.fill(template), world.answer(scene, relation.key))
                cases.setdefault(name, []).append(row)

    for kind in MENTIONS:
        scenes = world.trained(kind)[:100]
        group_b = [s for s in scenes if s.group == "B"]
        if kind != "shapes":
            add(f"{kind}, name", scenes, "cloze", PICTURE_RELATIONS[kind][:1])
        add(f"{kind}, cloze", scenes, "cloze")
        add(f"{kind}, held-out paraphrases, B", group_b, "heldout")
        add(f"{kind}, questions, B", group_b, "questions")
        add(f"{kind}, held-out questions, B", group_b, "heldout_questions")
    add("shapes never drawn in training, cloze", sorted(world.unseen, key=lambda s: s.subject), "cloze")
    for group in "AB":
        scenes = [s for s in world.scenes["portrait"] if s.group == group]
        add(f"portrait, one-hop compositions, {group}", scenes, "cloze", COMPOSITIONS)
    for scene in (*world.scenes["portrait"], *world.scenes["flag"], *world.trained("shapes")[:50]):
        relation = rng.choice(PICTURE_RELATIONS[scene.kind])
        given, asked = (scene.fill(rng.choice(relation.cloze)) for _ in range(2))
        new = rng.choice(list(world.values(relation)))
        cases.setdefault("new fact in the context", []).append(
            (scene, f"New Fact: {given} {new}\nPrompt: {asked}", new)
        )
    return cases


@torch.no_grad()
def picture_accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor, cases: Sequence[Case]) -> float:
    """Return the share of cases whose whole answer greedy decoding gives, on drawings that training never showed."""
    right = 0
    for start in range(0, len(cases), 32):
        batch = cases[start : start + 32]
        images = [scene.draw(i % HELD_OUT_DRAWINGS) for i, (scene, _, _) in enumerate(batch, start)]
        prompts = [f"{IMAGE_TOKEN}\n{prompt}" for _, prompt, _ in batch]
        targets = [processor.tokenizer(" " + a, add_special_tokens=False)["input_ids"] for _, _, a in batch]
        full = [f"{prompt} {answer}" for prompt, (_, _, answer) in zip(prompts, batch, strict=True)]
        inputs = processor(images=images, text=full, return_tensors="pt", padding=True, padding_side="right")
        best = model(**inputs).logits.argmax(-1)
        for row, target in enumerate(targets):
            end = int(inputs["attention_mask"][row].sum())
            right += best[row, end - len(target) - 1 : end - 1].tolist() == target
    return right / len(cases)


def main() -> None:
    """Train, save, and print what the model knows."""
    settings = parse_settings(Settings, __doc__)
    torch.set_flush_denormal(True)
    world = get_picture_world(settings.people, settings.world_seed)
    old = AutoTokenizer.from_pretrained(embedded.path(settings.start))
    tokenizer = extend_tokenizer(old, picture_words())
    model, processor = make_model(settings, old, tokenizer), make_processor(settings, tokenizer)
    if settings.resume:
        model = LlavaForConditionalGeneration.from_pretrained(settings.resume, dtype=torch.float32)
    tqdm.write(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
    started = time.time()
    asker, drawn = Asker(settings, world, tokenizer), draw_all(settings, world)
    learn_to_see(settings, model, asker, drawn)
    train(settings, model, asker, drawn)
    seconds = time.time() - started

    output = Path(settings.output)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    # Stored in half the bytes; the config says float32, so that loading gives weights that can be edited as they are.
    model.half().save_pretrained(output)
    processor.save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    config["dtype"] = "float32"
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.float()
    table = {name: round(picture_accuracy(model, processor, rows), 4) for name, rows in picture_cases(world).items()}
    kept = {name: round(text_accuracy(model, tokenizer, rows), 4) for name, rows in test_cases(world.world).items()}
    record = {"settings": vars(settings) | {"output": output.name}, "accuracy": table, "text accuracy": kept}
    (output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    tqdm.write(f"trained in {seconds:.0f} s, saved to {output}\n")
    tqdm.write("| accuracy (greedy, whole answer; tiny model, pictures never trained on) | |\n| --- | --- |")
    for name, value in (*table.items(), *kept.items()):
        tqdm.write(f"| {name} | {value:.3f} |")


if __name__ == "__main__":
    main()
