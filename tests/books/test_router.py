"""Which edit a prompt asks for. The encoder here counts words, so that every similarity can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hf_kedit.books import router as routing
from hf_kedit.books.router import (
    MOST_WORDS,
    SAME,
    UNRELATED,
    Address,
    EditRoute,
    EditRouter,
    asked_about,
    encoder_of_words,
    is_claim,
)
from hf_kedit.text.relations import COMMON_RELATIONS

_VOCABULARY = {word: i for i, word in enumerate(sorted({w for text in COMMON_RELATIONS for w in text.split()}))}
_WIDTH = len(_VOCABULARY) + 40
IGNORED = set("the of it is".split())


def counts(texts: Sequence[str]) -> torch.Tensor:
    """Bags of words without those that every relation has; words of the tests get places of their own."""
    rows = torch.zeros(len(texts), _WIDTH)
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            if word not in IGNORED:
                row[_VOCABULARY.setdefault(word, len(_VOCABULARY))] += 1
    assert len(_VOCABULARY) <= _WIDTH
    return rows


def address(edit_id: str, prompt: str, *names: str) -> Address:
    return Address.of(edit_id, [prompt], names)


@pytest.fixture
def router() -> EditRouter:
    return EditRouter(counts, slack=0.1).with_addresses(
        [
            address("tongue", "The mother tongue of Ada York is", "Ada York"),
            address("capital", "The capital of York is", "York"),
        ]
    )


def route(router: EditRouter, prompt: str) -> str | None:
    (found,) = router.route([prompt])
    return None if found is None else router.addresses[found.place].edit_id


def test_its_own_wording_and_others_with_the_same_words(router: EditRouter) -> None:
    assert route(router, "The mother tongue of Ada York is") == "tongue"
    assert route(router, "Rain fell. Tell me, what is Ada York's mother tongue?") == "tongue"
    assert route(router, "ADA  YORK, mother tongue:") == "tongue"


def test_another_fact_of_the_subject_is_not_claimed(router: EditRouter) -> None:
    # "father" is one of COMMON_RELATIONS word for word: similarity 1, against 0 for the edit.
    assert route(router, "The father of Ada York is") is None
    (candidate,) = router.explain("The father of Ada York is")
    assert (candidate.rival, candidate.claimed) == ("the father of it is", False)
    assert candidate.rival_similarity == pytest.approx(1.0) and candidate.similarity == pytest.approx(0.0)


def test_without_a_subject_nothing_is_asked_of_the_encoder() -> None:
    def never(texts: Sequence[str]) -> torch.Tensor:
        raise AssertionError(texts)

    router = EditRouter(never, 0.1).with_addresses([address("a", "The colour of Rome is", "Rome")], torch.ones(1, 3))
    assert router.route(["The mother tongue of Ada is", "A Roman road", "Romeo is", ""]) == [None] * 4


def test_the_longest_name_counts(router: EditRouter) -> None:
    assert [c.edit_id for c in router.explain("The capital of Ada York is")] == ["tongue"]
    assert route(router, "The capital of York is") == "capital"
    assert {c.edit_id for c in router.explain("Is York the capital of Ada York?")} == {"tongue", "capital"}


def test_slack_lets_rivals_be_nearer() -> None:
    edits = [address("team", "Ada plays the sport of", "Ada")]
    prompt = "Ada plays the instrument"
    # To the edit (plays, sport): cosine 1/2; to "it plays the instrument": 1. Not akin: 1/2 is below 0.6.
    (candidate,) = EditRouter(counts, 0.0).with_addresses(edits).explain(prompt)
    assert candidate.similarity == pytest.approx(0.5) and candidate.rival_similarity == pytest.approx(1.0)
    assert [EditRouter(counts, s).with_addresses(edits).route([prompt]) for s in (0.4, 0.6)] == [
        [None],
        [(0, True)],
    ]


def test_a_text_that_only_names_the_subject_is_not_claimed_however_large_the_slack() -> None:
    router = EditRouter(counts, slack=2.0).with_addresses([address("a", "The mother tongue of Ada is", "Ada")])
    assert route(router, "Ada sleeps badly") is None  # no word in common with the edit: cosine 0
    assert route(router, "Ada's tongue") == "a"
    assert route(router, "= Ada =") is None  # a heading
    alike = EditRouter(lambda texts: torch.ones(len(texts), 3), slack=2.0)
    named = alike.with_addresses([address("a", "Ada", "Ada")])
    assert route(named, "= Ada =") == "a"  # the edit's own wording is the name
    long = "rain fell on every " * 8
    assert route(router, f"Ada, {long} mother tongue") is None
    assert route(router, f"{long}. Ada's mother tongue") == "a"  # sentences before that name nobody do not count


def test_a_relation_that_means_the_edit_is_no_rival() -> None:
    edits = [address("father", "The father of Ada is", "Ada")]
    (candidate,) = EditRouter(counts, 0.0).with_addresses(edits).explain("Ada's father is")
    assert candidate.claimed and candidate.rival != "the father of it is"


def test_the_nearer_edit_wins_and_of_equals_the_later() -> None:
    router = EditRouter(counts, 2.0).with_addresses(
        [
            address("old", "The father of Ada is", "Ada"),
            address("mother", "The mother of Ada is", "Ada"),
            address("new", "The father of Ada is", "Ada"),
        ]
    )
    assert route(router, "Who is the father of Ada") == "new"
    assert route(router, "Ada's mother") == "mother"
    assert route(router.without({"new"}), "Who is the father of Ada") == "old"


def test_a_state_tells_an_edit_whose_subject_nobody_names() -> None:
    """The state of a prompt is here how often it has the letters z and y."""

    def letters(texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[text.count("z"), text.count("y")] for text in texts]).float()

    edits = [address("zz", "The z of Ada is", "Ada"), address("yy", "The y of Bob is", "Bob")]
    router = EditRouter(counts, 0.1, alike=0.9).with_addresses(edits, states=torch.eye(2))
    prompts = ["zzz", "Ada zz", "Bob zz", "zy"]
    assert router.route(prompts, letters) == [(0, False), (0, True), (0, False), None]
    found = [next(iter(router.explain(prompt, letters)), None) for prompt in prompts]
    assert [c and (c.edit_id, c.named, c.by) for c in found] == [
        ("zz", False, "state"),
        ("zz", True, "state"),
        ("zz", False, "state"),
        None,
    ]


def test_other_names() -> None:
    router = EditRouter(counts, 0.1).with_addresses([address("a", "The father of Ada York is", "Ada York", "Lady A.")])
    assert route(router, "The father of lady a is") == "a"


def test_a_chat_is_read_at_its_last_user_turn(router: EditRouter) -> None:
    chat = (
        "<|im_start|>user\nThe mother tongue of Ada York?<|im_end|>\n<|im_start|>assistant\nFrench<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert route(router, chat.format("And her father?")) is None  # who "her" is, is not looked for
    assert route(router, chat.format("Ada York: mother tongue?")) == "tongue"


def test_what_a_prompt_asks_about() -> None:
    names = [("ada", "york"), ("ada",)]
    assert asked_about("Snow fell. The father of Ada York, is he", names) == "the father of it is he"
    assert asked_about("Ada York was late. Her mother, it was said, is", names) == (
        "it was late her mother it was said is"
    )
    assert asked_about("A prompt about Adam", names) is None
    assert asked_about("The age of J. R. Kim is", [("j", "r", "kim")]) == "the age of it is"


def test_states_that_share_memory_do_not_see_each_other(router: EditRouter) -> None:
    first = router.with_addresses([address("x", "The father of Bo is", "Bo")])
    second = router.with_addresses([address("y", "The mother of Bo is", "Bo")])
    assert route(first, "The father of Bo is") == "x" and route(second, "The mother of Bo is") == "y"
    assert route(first, "The mother of Bo is") is None
    assert route(router, "The father of Bo is") is None
    assert len(router) == 2 and [a.edit_id for a in second.addresses] == ["tongue", "capital", "y"]
    left = first.without({"tongue"})
    assert route(left, "The mother tongue of Ada York is") is None and route(left, "The father of Bo is") == "x"
    assert torch.equal(left.views.tensor, first.views.tensor[1:])


def test_every_wording_of_every_edit_counts_whatever_stood_before_it() -> None:
    """Two and three wordings: vectors lie one behind the other, and are counted off when an edit in front goes."""
    ada = Address.of("ada", ["The tongue of Ada is", "The voice of Ada is"], ["Ada"])
    bob = Address.of("bob", ["The garden of Bob is", "The orchard of Bob is", "The meadow of Bob is"], ["Bob"])
    both = EditRouter(counts, slack=0.1).with_addresses([ada, bob])
    for router, known in ((both, ["ada", "bob"]), (both.without({"ada"}), ["bob"]), (both.without({"bob"}), ["ada"])):
        for made in (ada, bob):
            for view in made.views:
                prompt = view.replace("it", made.names[0][0])
                assert route(router, prompt) == (made.edit_id if made.edit_id in known else None)
            other = "The meadow of Ada is" if made is ada else "The voice of Bob is"
            assert route(router, other) is None  # the wording of another edit


def test_the_words_of_a_model_as_an_encoder() -> None:
    embedding = torch.eye(300)
    ids = {word: i for i, word in enumerate({w for text in COMMON_RELATIONS for w in text.split()})}
    encode = encoder_of_words(embedding, lambda text: [ids.get(w, 299) for w in text.split()])
    common = torch.stack([embedding[[ids[w] for w in t.split()]].mean(dim=0) for t in COMMON_RELATIONS]).mean(dim=0)
    wanted = embedding[[ids["the"], ids["father"]]].mean(dim=0) - common
    torch.testing.assert_close(encode(["the father"])[0], wanted)


@pytest.mark.parametrize(("words", "claimed"), [(MOST_WORDS, True), (MOST_WORDS + 1, False)])
def test_a_question_has_at_most_so_many_words(words: int, claimed: bool) -> None:
    assert is_claim(" ".join(["word"] * words), 0.9, 0.1, 0.0) is claimed


@pytest.mark.parametrize(
    ("asked", "similarity", "rival", "slack", "claimed"),
    [
        ("the job of it is", 0.5, 0.75, 0.25, False),  # as much nearer as is allowed is too much
        ("the job of it is", 0.5, 0.625, 0.25, True),
        ("the job of it is", 0.5, 0.5, 0.0, False),
        ("the job of it is", UNRELATED, 0.0, 0.0, True),
        ("the job of it is", UNRELATED - 1e-6, 0.0, 1.0, False),
        ("it", SAME, 0.0, 1.0, False),
        ("it", 1.0, 1.0, 0.0, True),  # the edit's own wording is the name: nothing is nearer
    ],
)
def test_where_a_claim_begins(asked: str, similarity: float, rival: float, slack: float, claimed: bool) -> None:
    assert is_claim(asked, similarity, rival, slack) is claimed


@pytest.mark.parametrize(("alike", "claimed"), [(0.6, True), (0.61, False)])
def test_where_a_state_is_alike(alike: float, claimed: bool) -> None:
    """The cosine of the two states is 0.6; just enough is enough. Whether the prompt names the subject is told."""
    one = EditRouter(counts, 0.0, alike).with_addresses(
        [address("capital", "The capital of York is", "York")], states=torch.tensor([[1.0, 0.0]])
    )

    def read(prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[0.6, 0.8]]).repeat(len(prompts), 1)

    assert one.route(["Where do they sit?", "York sits in"], read) == (
        [EditRoute(0, False), EditRoute(0, True)] if claimed else [None, None]
    )
    found = one.explain("Where do they sit?", read)
    assert [c.edit_id for c in found] == (["capital"] if claimed else [])


def test_a_name_counts_again_where_it_stands_by_itself(router: EditRouter) -> None:
    """Inside of a longer name it does not, wherever in that it stands."""
    more = router.with_addresses([address("mayor", "The mayor of Ada York City is", "Ada York City")])
    assert route(more, "The mayor of Ada York City is") == "mayor"
    assert route(more, "The mother tongue of Ada York is") == "tongue"
    assert {c.edit_id for c in more.explain("The capital of York, not of Ada York City, is")} == {"mayor", "capital"}


def test_what_is_forgotten_is_found_again(router: EditRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_REMEMBERED", 2)
    prompts = ["The capital of York is", "They say", "The mother tongue of Ada York is"]
    for _ in range(2):
        assert [route(router, prompt) for prompt in prompts] == ["capital", None, "tongue"]
    assert len(router._known) <= 2
    assert [found and found.place for found in router.route(prompts)] == [1, None, 0]
