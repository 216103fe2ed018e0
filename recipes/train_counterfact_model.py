"""Train a tiny language model that knows facts of CounterFact, from scratch, and edit it with CounterFact.

    python recipes/train_counterfact_model.py --facts counterfact-edit.json --output out/counterfact-gpt2

The facts are read from a flat CounterFact file (``prompt, subject, ground_truth, locality_prompt …``, see
docs/datasets.md) when the recipe runs; nothing of it is part of this repository. Tokenizer, model, attention masks and
the training loop are those of train_world.py, which explains them. Here: from rows to facts and templates, the text
that states them, what the trained model knows, and CounterFact editing on it from end to end.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from train_world import Settings as WorldSettings
from train_world import accuracy, make_model, make_rows, parse_settings, save, train, train_tokenizer

from hf_kedit import Comparison, EditableModel, evaluate_edits, load_edit_dataset
from hf_kedit.config import config_class
from hf_kedit.config.hparams import find_hparams
from hf_kedit.data.world_text import Document, filler_sentence
from hf_kedit.evaluation import Generation, Likelihood, TeacherForced
from hf_kedit.requests import SLOT, EditRequest, load_requests

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Settings(WorldSettings):
    """What differs from the fact world's recipe. Each field is a command line option of the same name."""

    output: str = "counterfact-gpt2"
    facts: str = "counterfact-edit.json"
    cases: int = 1000  # rows of the file whose facts are taught
    steps: int = 1953  # of batch * context tokens: 3.0 M tokens
    vocabulary: int = 2500
    width: int = 192
    heads: int = 6
    curriculum_facts: int = 150
    own_template: float = 0.25  # share of the statements of a fact in its own wording
    held_out: float = 0.25  # share of a relation's wordings that only their own facts are stated in
    filler: float = 0.1  # share of documents without facts
    train: bool = True  # --no-train edits what --output already holds
    edits: int = 100
    methods: str = "rome memit ft-m"


# ------------------------------------------------------------------------------------------------ facts


@dataclass(frozen=True)
class Fact:
    """Subject, object, and the template of the prompt that the file states it with (one slot)."""

    subject: str
    object: str
    template: str


@dataclass
class Facts:
    """What the file says.

    Args:
        facts: distinct facts, of edit prompts first.
        relations: template → all templates of its relation, in order.
        held_out: templates that are used for their own facts only.
    """

    facts: list[Fact]
    relations: dict[str, list[str]]
    held_out: set[str]

    def others(self, fact: Fact) -> list[str]:
        """The templates in which a fact may be stated besides its own."""
        return [t for t in self.relations[fact.template] if t != fact.template and t not in self.held_out]


def read_facts(settings: Settings) -> Facts:
    """Turn rows into facts: those of the edit prompts, and those of the locality prompts, whose subject is found.

    A row's edit prompt and locality prompt state the same relation, which is what joins templates to relations.
    """
    rows = load_requests(load_edit_dataset("counterfact_flat", path=settings.facts, limit=settings.cases))
    rows = [row for row in rows if row.ground_truth]
    templates = {row.template for row in rows}
    relation = {template: template for template in templates}  # template → one that stands for its relation

    def root(template: str) -> str:
        while relation[template] != template:
            template = relation[template]
        return template

    found = [Fact(row.subject or "", row.ground_truth[0], row.template) for row in rows]
    for row in rows:
        for prompt, answer in locality_prompts(row):
            fact = recognise(prompt, answer, templates)
            if fact is not None:
                found.append(fact)
                relation[root(fact.template)] = root(row.template)
    distinct: dict[tuple[str, str], Fact] = {}
    for fact in found:  # a file may state a fact twice, or contradict itself: the first counts
        distinct.setdefault((fact.subject, root(fact.template)), fact)
    members: dict[str, list[str]] = {}
    for template in sorted(templates):
        members.setdefault(root(template), []).append(template)
    rng = random.Random(f"held out {settings.seed}")
    held_out = {t for group in members.values() for t in rng.sample(group, int(settings.held_out * len(group)))}
    return Facts(list(distinct.values()), {t: members[root(t)] for t in templates}, held_out)


def locality_prompts(row: EditRequest) -> list[tuple[str, str]]:
    """The locality prompts of a row with their answers."""
    return [(p.prompt, p.answers[0]) for probes in row.locality.values() for p in probes if p.answers]


def recognise(prompt: str, answer: str, templates: set[str]) -> Fact | None:
    """Find the subject of a prompt by the most specific template that fits."""
    best: Fact | None = None
    for template in templates:
        before, after = template.split(SLOT)
        subject = prompt.removeprefix(before).removesuffix(after)
        fits = prompt == before + subject + after and subject.strip()
        if fits and (best is None or len(template) > len(best.template)):
            best = Fact(subject, answer, template)
    return best


# ------------------------------------------------------------------------------------------------ text


def documents(settings: Settings, facts: Facts, chosen: Sequence[Fact], seed: int) -> Iterator[Document]:
    """Write about the chosen facts without end: one to four statements, now and then behind or without other text."""
    rng = random.Random(f"counterfact text {seed}")
    while True:
        document = Document()
        only_filler = rng.random() < settings.filler
        if only_filler or rng.random() < 0.2:
            for _ in range(rng.randint(1, 3)):
                document.gap().add(filler_sentence(rng))
        if not only_filler:
            for fact in rng.sample(chosen, min(len(chosen), rng.randint(1, 4))):
                others = facts.others(fact)
                own = not others or rng.random() < settings.own_template
                document.gap().add_fact(fact.template if own else rng.choice(others), fact.subject, fact.object)
        yield document


def knowledge(settings: Settings, facts: Facts) -> dict[str, list[tuple[str, str]]]:
    """Return the rows of the accuracy table as lists of (prompt, object)."""
    rows = load_requests(load_edit_dataset("counterfact_flat", path=settings.facts, limit=settings.cases))
    rng = random.Random("table")
    edited = [(row.filled_prompt, row.ground_truth[0]) for row in rows if row.ground_truth]
    cases = {
        "edit prompts": edited,
        "edit prompts behind two filler sentences": [
            (f"{filler_sentence(rng)} {filler_sentence(rng)} {prompt}", answer) for prompt, answer in edited
        ],
        "held-out wordings": [
            (template.replace(SLOT, fact.subject), fact.object)
            for fact in facts.facts
            for template in facts.relations[fact.template]
            if template in facts.held_out and template != fact.template
        ],
        "locality prompts": [pair for row in rows for pair in locality_prompts(row)],
        "the file's own rephrasings": [
            (prompt, row.ground_truth[0]) for row in rows if row.ground_truth for prompt in row.rephrase_prompts
        ],
    }
    return {name: pairs for name, pairs in cases.items() if pairs}


# ------------------------------------------------------------------------------------------------ editing


def edit(settings: Settings) -> Comparison:
    """Edit the trained model with the file's counterfactual targets, one by one, and measure before and after."""
    rows = load_edit_dataset("counterfact_flat", path=settings.facts, limit=settings.edits)
    protocols = [TeacherForced(), Likelihood(), Generation(max_new_tokens=10)]
    reports = {}
    for method in settings.methods.split():
        config = config_class(method)
        # The settings of the embedded model, which has the same layout and depth.
        known = find_hparams(config.edit_type, "world-gpt2") if settings.layout == "gpt2" else None
        model = EditableModel.from_pretrained(settings.output, config.from_dict(known[1] if known else {}))
        reports[method] = evaluate_edits(model, rows, protocol=protocols, on_error="skip")
    return Comparison(reports)


def main() -> None:
    """Train, save, print what the model knows, edit it, and print and save what the edits did."""
    settings = parse_settings(Settings, __doc__)
    output = Path(settings.output)
    if settings.train:
        torch.set_flush_denormal(True)
        facts = read_facts(settings)
        few = facts.facts[: settings.curriculum_facts]
        text = documents(settings, facts, facts.facts, seed=10_000 + settings.seed)
        tokenizer = train_tokenizer(settings, (d.text for d in itertools.islice(text, 20_000)))
        model = make_model(settings, tokenizer)
        n_relations = len({tuple(r) for r in facts.relations.values()})
        tqdm.write(f"{len(facts.facts)} facts, {n_relations} relations, {len(facts.relations)} wordings")
        tqdm.write(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {len(tokenizer)}")
        first = documents(settings, facts, few, seed=1 + settings.seed)
        rest = documents(settings, facts, facts.facts, seed=2 + settings.seed)
        rows = make_rows(settings, tokenizer, first, rest)
        started = time.time()
        train(settings, model, rows)
        tqdm.write(f"trained in {time.time() - started:.0f} s, saved to {output}\n")
        table = {name: round(accuracy(model, tokenizer, c), 4) for name, c in knowledge(settings, facts).items()}
        record = {**vars(settings), "output": output.name, "facts": Path(settings.facts).name}
        save(model, tokenizer, output, {"settings": record, "accuracy": table})
        print("| accuracy (greedy, whole object; tiny model) | |\n| --- | --- |")
        print("\n".join(f"| {name} | {value:.3f} |" for name, value in table.items()), end="\n\n")
    comparison = edit(settings)
    comparison.to_html(output / "report.html", title="CounterFact on a tiny model")
    comparison.to_json(output / "report.json")
    print(comparison.to_markdown(max_cases=0))


if __name__ == "__main__":
    main()
