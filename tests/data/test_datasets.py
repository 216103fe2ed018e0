"""Every registered dataset reads its sample: small invented files in the layout in which each set is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_kedit.data import FEATURES, dataset_entry, dataset_names, load_edit_dataset, load_report, to_easyedit
from hf_kedit.data.opinions import TEMPLATES
from hf_kedit.data.qa_sets import WIKIBIGEDIT_STEPS
from hf_kedit.data.ripple import guess_subject, split_statement
from hf_kedit.errors import DataError, RequestError
from hf_kedit.requests import EditRequest, load_requests

SAMPLES = Path(__file__).parent / "samples"
FOLDERS = {"counterfact_plus": "editing_data", "zsre_plus": "editing_data"}
# Sets whose parts have one layout share one sample.
FILES = {
    **{f"wikibigedit/{step}": "wikibigedit/wiki_big_edit_20240201_20240220.json" for step in WIKIBIGEDIT_STEPS[1:]},
    **{f"ripple_edits/{part}": "ripple_edits/random.json" for part in ("recent", "popular")},
    **{f"mquake/{part}": "mquake/MQuAKE-CF.json" for part in ("cf_3k", "t")},
    **{f"mquake_remastered/{part}": "mquake_remastered/CF3k.json" for part in ("cf_9k", "cf_6334", "t")},
    "mmedit/caption": "mmedit/caption",
    "mmedit/vqa": "mmedit/vqa",
    **{f"mmke/{part}": f"mmke/{part}" for part in ("entity", "visual", "user")},
}


def place(name: str) -> Path:
    """Return the sample of a dataset: a folder as it is published, or the file of a sister set."""
    family = name.split("/")[0]
    if name in FILES:
        return SAMPLES / FILES[name]
    if family == "conceptedit":
        return SAMPLES / family / f"final_gpt2_{name.rsplit('_', 1)[1]}.json"
    if family == "cknowedit" and name.split("/")[1] not in ("idiom", "ruozhiba"):
        return SAMPLES / "cknowedit" / "CKnowEdit" / "idiom.json"
    return SAMPLES / FOLDERS.get(family, family)


def load(name: str, split: str | None = None, **options: Any) -> Any:
    return load_edit_dataset(name, split=split, path=place(name), **options)


FILED = [name for name in dataset_names() if dataset_entry(name).source is not None]
PARTS = [
    (name, split)
    for name in FILED
    for split in dataset_entry(name).splits
    if place(name).is_dir() or split == dataset_entry(name).default_split
]


def test_the_whole_catalogue_is_registered() -> None:
    families = {name.split("/")[0] for name in FILED}
    assert families == {
        "knowedit", "counterfact", "counterfact_flat", "counterfact_plus", "zsre", "zsre_plus", "mquake",
        "ripple_edits", "cknowedit", "conceptedit", "safeedit", "personalityedit", "mmedit", "qaedit", "wikibigedit",
        "ultraeditbench", "halluedit", "akew", "unke", "leme", "fever",
        "vlkeb", "mmke", "comprehendedit", "conflictedit", "roundedit", "mquake_remastered",
    }  # fmt: skip
    parts = {
        "knowedit": ("wiki_recent", "zsre", "wikibio", "wiki_counterfact", "convsent", "sanitation"),
        "counterfact_plus": ("one_hop", "subject_replace", "distracting_neighbor", "other_attribution"),
        "zsre_plus": ("one_hop", "subject_replace", "inverse_relation"),
        "mquake": ("cf", "cf_3k", "t"),
        "ripple_edits": ("recent", "random", "popular"),
        "mmedit": ("caption", "vqa"),
        "mmke": ("entity", "visual", "user"),
        "halluedit": ("llama2", "llama3", "mistral"),
        "akew": ("counterfact", "mquake_cf", "wikiupdate"),
        "leme": ("counterfact", "zsre"),
        "wikibigedit": WIKIBIGEDIT_STEPS,
        "conflictedit": ("coverage", "reverse", "composite"),
        "roundedit": ("easy", "hard"),
        "mquake_remastered": ("cf_3k", "cf_9k", "cf_6334", "t"),
    }  # fmt: skip
    for family, names in parts.items():
        assert {n for n in FILED if n.startswith(f"{family}/")} == {f"{family}/{part}" for part in names}
    assert len(WIKIBIGEDIT_STEPS) == 8 and dataset_entry("KnowEdit/ZsRE").name == "knowedit/zsre"
    assert len([n for n in FILED if n.startswith("cknowedit/")]) == 11  # ten categories, three of them also in one
    assert len([n for n in FILED if n.startswith("conceptedit/")]) == 8


@pytest.mark.parametrize(("name", "split"), PARTS)
def test_every_sample_loads(name: str, split: str) -> None:
    table = load(name, split)
    report = load_report(table)
    assert table.features == FEATURES and len(table) == report.kept > 0
    assert report.read == report.kept + sum(report.dropped.values()) and report.complete
    assert report.files and all(Path(file).is_file() for file in report.files)
    assert len(set(table["id"])) == len(table)
    for row in table:
        assert row["dataset"] == name and row["id"].startswith(f"{name}/")
        for text in [row["prompt"], row["target_new"], *row["ground_truth"]]:
            assert text and text == text.strip()
        assert row["subject"] is None or row["subject"].strip()
        assert all(text.strip() for text in row["rephrase_prompts"])
        assert isinstance(row["extra"], dict)
        for one in row["locality"] + row["portability"]:
            assert one["prompt"].strip() and one["name"]
            assert one["ground_truth"] or one["name"] == "locality_question"
            assert all(group and all(a == a.strip() != "" for a in group) for group in one["ground_truth"])
        assert to_easyedit(row)["prompt"] == row["prompt"]
    requests = load_requests(table)
    assert all(isinstance(r, EditRequest) for r in requests)
    streamed = list(load(name, split, streaming=True))
    assert streamed == table.to_list()


def only(name: str, **options: Any) -> list[dict[str, Any]]:
    return load(name, **options).to_list()


def probes(row: dict[str, Any]) -> dict[str, list[tuple[str, Any]]]:
    found: dict[str, list[tuple[str, Any]]] = {}
    for one in row["locality"] + row["portability"]:
        found.setdefault(one["name"], []).append((one["prompt"], one["ground_truth"]))
    return found


# ---------------------------------------------------------------------- KnowEdit


def test_knowedit_answers_of_all_shapes() -> None:
    table = load("knowedit/wiki_recent")
    report = load_report(table)
    assert report.dropped == {"no target": 1} and report.dropped_probes == {"no answer": 1}
    first, second = table
    assert probes(first)["Logical_Generalization"][0][1] == [["no"], ["incorrect"], ["is dead"]]
    assert probes(first)["Subject_Aliasing"][0][1] == [["Oslo", "Kristiania"]]
    assert {p["match"] for p in first["portability"]} == {"any"}
    # Text that looks like JSON stays text.
    assert second["target_new"] == "1998"
    assert [p["ground_truth"] for p in second["locality"]] == [[["true"]], [["null"]]]


def test_knowedit_row_of_the_specification() -> None:
    first, second = only("knowedit/zsre")
    assert first == {
        "id": "knowedit/zsre/0",
        "dataset": "knowedit/zsre",
        "task": "fact",
        "group_id": None,
        "group_index": 0,
        "group_size": 1,
        "prompt": "Where did Ada Bell die?",
        "subject": "Ada Bell",
        "target_new": "Oslo",
        "ground_truth": ["Bergen"],
        "target_neg": None,
        "rephrase_prompts": ["In which town did Ada Bell die?"],
        "locality": [
            {
                "name": "Relation_Specificity",
                "prompt": "Ada Bell sex or gender",
                "ground_truth": [["female"]],
                "match": "any",
                "image": None,
            }
        ],
        "portability": [
            {
                "name": "Reasoning",
                "prompt": "In which country did Ada Bell die?",
                "ground_truth": [["Norway"]],
                "match": "any",
                "image": None,
            }
        ],
        "image": None,
        "image_rephrase": None,
        "extra": {"cond": "Bergen >> Oslo || Where did Ada Bell die?"},
    }
    assert second["locality"] == second["portability"] == []


def test_knowedit_other_spellings() -> None:
    (bio,) = only("knowedit/wikibio")
    assert bio["subject"] == "ada bell" and bio["target_new"].startswith("She was born")
    assert bio["extra"] == {"prompt_raw": bio["prompt"] + " "}
    first = only("knowedit/wiki_counterfact")[0]
    assert first["rephrase_prompts"] == ["Ada Bell died in"] and first["ground_truth"] == ["Bergen"]
    assert probes(first)["Relation_Specificity"] == [("The mother of Ada Bell is", [["Eva Bell", "E. Bell"]])]
    assert probes(first)["Forgetfulness"][0][1] == [["Bergen"]]
    assert len(only("knowedit/wiki_counterfact", drop_conflicts="first")) == 1


def test_convsent_directions_and_templates() -> None:
    table = load("knowedit/convsent")
    assert load_report(table).dropped == {"no target": 1}
    assert table[0]["prompt"] == "What do you think of rowing boats?" and table[0]["task"] == "sentiment"
    assert table[0]["target_new"] == "Rowing boats are lovely!"
    assert table[0]["extra"]["direction"] == "positive" and len(table[0]["extra"]["pos"]) == 2
    negative = only("knowedit/convsent", direction="negative")
    assert [r["target_new"] for r in negative] == [
        "I cannot stand rowing boats.", "Lakes are dull.", "Tea is bitter."
    ]  # fmt: skip
    drawn = [
        [(r["prompt"], r["extra"]["direction"]) for r in only("knowedit/convsent", direction="random",
                                                              template="random", seed=seed)]
        for seed in range(6)
    ]  # fmt: skip
    assert len({str(d) for d in drawn}) > 1
    again = only("knowedit/convsent", direction="random", template="random", seed=0, limit=1)
    assert (again[0]["prompt"], again[0]["extra"]["direction"]) == drawn[0][0]
    assert len(TEMPLATES) == 13 and only("knowedit/convsent", template=12)[0]["prompt"].endswith("of rowing boats?")
    for wrong in ({"direction": "up"}, {"template": 13}, {"template": "x"}):
        with pytest.raises(DataError):
            load("knowedit/convsent", **wrong)


def test_sanitation_spreads_what_to_keep() -> None:
    train = only("knowedit/sanitation", split="train")
    assert [r["target_new"] for r in train] == ["I don't know."] * 2 and train[0]["ground_truth"] == ["Cheese"]
    kept = [p for r in train for p in probes(r)["Retain"]]
    assert [len(r["locality"]) for r in train] == [2, 3]
    assert kept == [(f"What is number {i}?", [[str(1990 + i)]]) for i in range(5)]
    (test,) = only("knowedit/sanitation", forget_target="No idea.")
    assert test["target_new"] == "No idea." and test["extra"] == {"mode": "forget"}


# ---------------------------------------------------------------------- CounterFact and zsRE


def test_counterfact() -> None:
    first, second = only("counterfact")
    assert first["prompt"] == "The mother tongue of Ada Bell is" and first["ground_truth"] == ["Czech"]
    assert first["rephrase_prompts"] == ["\n\nA noise sentence. Ada Bell, a native"]
    assert probes(first)["neighborhood"][1] == ("Jan Hus speaks", [["Czech"]])
    assert first["extra"]["template"] == "The mother tongue of {} is"
    assert first["extra"]["target_new_id"] == "Q7411" and len(first["extra"]["attribute_prompts"]) == 1
    assert first["extra"]["generation_prompts"] == ["Ada Bell's favourite dish is"]
    assert second["prompt"] == "Jan Mol, who works for" and second["ground_truth"] == ["Acme {Ltd}"]
    flat = only("counterfact_flat")
    assert probes(flat[0]) == {"neighborhood": [("Jan Novak speaks", [["Czech"]])]}
    train = load("counterfact_flat", "train")
    assert load_report(train).dropped == {"no alternative target": 1}
    assert probes(train[0])["neighborhood"][0][1] == [["Jan Mol"]]


def test_zsre_has_two_uses() -> None:
    alternative = load("zsre")
    assert load_report(alternative).dropped == {"no alternative target": 1}
    assert alternative[0]["target_new"] == "Oslo" and alternative[0]["ground_truth"] == ["Bergen"]
    true = only("zsre", target="answers", question_mark=True)
    assert [(r["target_new"], r["ground_truth"]) for r in true] == [("Bergen", ["Rome"]), ("1998", ["1990"])]
    assert probes(true[0])["nq"][0][0].endswith("cook book?")
    assert not probes(alternative[0])["nq"][0][0].endswith("?")
    with pytest.raises(DataError, match="target"):
        load("zsre", target="truth")


def test_plus_probes() -> None:
    def added(name: str, axis: str) -> list[tuple[str, Any]]:
        return [p for row in only(name) for p in probes(row).get(axis, [])]

    country = ("In which country did Ada Bell die?", [["Norway"]])
    assert added("counterfact_plus/one_hop", "One_Hop") == added("zsre_plus/one_hop", "One_Hop") == [country]
    assert added("counterfact_plus/subject_replace", "Subject_Replace") == [
        ("The mother tongue of A. Bell is", [["Dutch"]]),
        ("J. Mol works for", [["Bolt"]]),
    ]
    assert added("zsre_plus/subject_replace", "Subject_Replace") == [("Where did A. Bell die?", [["Oslo"]])]
    assert added("zsre_plus/inverse_relation", "Inverse_Relation") == [("Who died in Oslo?", [["Ada Bell"]])]
    ((prompt, answer),) = added("counterfact_plus/distracting_neighbor", "Distracting_Neighbor")
    assert prompt.startswith("The mother tongue of Ada Bell is Dutch.") and answer == [["Czech"]]
    assert added("counterfact_plus/other_attribution", "Other_Attribution") == [
        ("The employer of Ada Bell is", [["Acme"]])
    ]
    rows = only("counterfact_plus/subject_replace", commonsense=SAMPLES / "editing_data")
    assert [probes(r)["Commonsense"] for r in rows] == [
        [("open a jar", [["twist the lid"]])],
        [("row a boat", [["pull the oars"]])],
    ]
    assert rows[1]["extra"]["commonsense_choices"] == ["pull the oars", "sing"]
    with pytest.raises(DataError, match="labels"):
        load("counterfact_plus/one_hop", commonsense=SAMPLES / "zsre")


# ---------------------------------------------------------------------- groups and ripples


def test_mquake_groups() -> None:
    rows = only("mquake/cf")
    assert [(r["id"], r["group_id"], r["group_index"], r["group_size"]) for r in rows] == [
        ("mquake/cf/0.0", "mquake/cf/0", 0, 2),
        ("mquake/cf/0.1", "mquake/cf/0", 1, 2),
        ("mquake/cf/1", None, 0, 1),
    ]
    assert rows[0]["portability"] == [] and rows[0]["prompt"] == "Ada Bell is a citizen of"
    assert [p[1] for p in probes(rows[1])["Multi_Hop"]] == [[["Cusco", "City of Kings"]]] * 3
    assert probes(rows[1])["Single_Hop"][0][1] == [["Peru", "Republic of Peru"]]
    assert rows[1]["extra"]["questions"] == ["q1?", "q2?", "q3?"] and rows[1]["extra"]["case_id"] == 1
    assert probes(rows[2])["Multi_Hop"][0][1] == [["1998"]]
    assert only("mquake/cf", form="question")[1]["prompt"] == "What is the capital of Peru?"
    with pytest.raises(DataError, match="form"):
        load("mquake/cf", form="poem")


def test_groups_are_never_cut() -> None:
    table = load("mquake/cf", limit=2)
    assert [r["group_index"] for r in table] == [0, 1]
    with pytest.raises(DataError, match=r"no usable.*cut by the limit"):
        load("mquake/cf", limit=1)
    table = load("mquake/cf", exclude=["the capital of  PERU is"])
    assert table["id"][:] == ["mquake/cf/1"] and load_report(table).dropped == {"excluded": 2}


def test_ripple_edits() -> None:
    table = load("ripple_edits/random")
    assert load_report(table).dropped == {"no target to be told from the prompt": 1}
    first, second = table
    assert (first["prompt"], first["target_new"]) == ("The capital of the land of Ruritania is", "Strelsau")
    assert first["ground_truth"] == ["Stadt Zenda"] and first["extra"]["edit"]["relation"] == "CAPITAL"
    assert {p["match"] for p in first["portability"]} == {"all"}
    assert probes(first)["Compositionality_I"][0][1] == [["Rur", "the Rur"], ["Rudolf"]]
    assert {p["name"] for p in first["locality"]} == {"Relation_Specificity", "Forgetfulness"}
    tests = {t["name"]: t for t in first["extra"]["tests"]}
    assert tests["Logical_Generalization"]["condition_queries"] == [
        {"prompt": "Ruritania is a", "ground_truth": [["country"]]}
    ]
    at = tests["Compositionality_I"]["probes"]
    assert [first["portability"][i]["name"] for i in at] == ["Compositionality_I"]
    # The verb in the answer is not where the statement is split.
    assert (second["prompt"], second["target_new"]) == ("The name of the first film of Ada Bell is", "What Is This")


@pytest.mark.parametrize(
    ("statement", "answers", "old", "halves"),
    [
        ("The capital of A is B.", [], None, ("The capital of A is", "B")),
        ("The capital of A is B. C.", ["B. C."], None, ("The capital of A is", "B. C")),
        ("The film of A is This is B.", [], "The film of A is That.", ("The film of A is", "This is B")),
        ("The film of A is B is C.", ["c"], None, ("The film of A is B is", "C")),
        ("Nothing.", ["B"], None, None),
        ("It is ", [], None, None),
    ],
)
def test_splitting_statements(
    statement: str, answers: list[str], old: str | None, halves: tuple[str, str] | None
) -> None:
    assert split_statement(statement, answers, old) == halves


def test_guessing_subjects() -> None:
    prompt = "The place of birth of Bank of A is"
    assert guess_subject(prompt, ["The name of the owner of Bank of A is"]) == "Bank of A"
    assert guess_subject(prompt, ["The date of birth of Bank of A is"]) == "Bank of A"
    assert guess_subject(prompt, []) is None
    assert guess_subject(prompt, ["Who owns it?"]) is None


# ---------------------------------------------------------------------- the others


def test_flat_question_sets() -> None:
    (row,) = only("qaedit")
    assert row["prompt"] == "who built the pier" and row["extra"]["prompt_raw"] == " who built the pier"
    assert probes(row)["qa"][1] == ("when did it rain", [["1994"]]) and row["extra"]["source"] == "NQ"
    first, second = only("wikibigedit/20240201_20240220")
    assert first["rephrase_prompts"] == ["What is the workplace of Ada Bell?", "Hey, where is Ada Bell working?"]
    assert probes(first)["Multi_Hop"] == [("In which country does Ada Bell work?", [["Norway"]])]
    assert second["portability"] == [] and second["target_new"] == "1998"
    assert [r["target_new"] for r in only("ultraeditbench")] == ["null", "Oslo", "Oslo"]
    (long,) = only("unke")
    assert long["task"] == "unstructured" and probes(long)["Sub_Question"][1][1] == [["1871"]]


def test_halluedit_reads_all_topics_of_a_model() -> None:
    rows = only("halluedit/llama2")
    assert [r["extra"]["topic"] for r in rows] == ["places_landmark"] * 2 + ["technology_software"] * 2
    assert [r["id"] for r in rows] == [f"halluedit/llama2/{i}" for i in range(4)]
    first, second = rows[:2]
    assert first["target_new"] == "Piet Mol" and first["ground_truth"] == ["Jan Mol"]
    assert set(probes(first)) == {"locality_question", "hop_2", "hop_3"}
    assert first["extra"]["multiple_choice"]["choices"] == ["Piet Mol", "Jan's"]
    assert set(probes(second)) == {"hop_3"} and second["ground_truth"] == []


def test_sets_of_other_kinds() -> None:
    chinese = only("cknowedit/idiom")
    assert chinese[0]["ground_truth"] == ["画得很好"] and chinese[1]["rephrase_prompts"] == ["“乐”的读音是"]
    (concept,) = only("conceptedit/gpt2_intra")
    assert concept["extra"] == {
        "module": "intra", "instance_prompts": ["Whether Mol House belongs to category publisher?"]
    }  # fmt: skip
    (safe,) = only("safeedit")
    assert safe["target_neg"] == "Drill a hole." and set(safe["extra"]["general_prompts"]) == {
        "onlyQ", "otherA", "otherQ", "otherAQ"
    }  # fmt: skip
    assert probes(safe) == {"knowledge_constraint": [("The capital of Norway is", [["Oslo"]])]}
    assert only("safeedit", split="val")[0]["extra"]["general_prompts"] == {}
    club, lake = only("personalityedit")
    assert club["target_new"] == "They are friendly places." and club["extra"]["locality_entity"] == "lakes"
    assert lake["extra"]["locality_entity"] == "chess clubs" and len(club["rephrase_prompts"]) == 12
    drawn = {
        tuple(r["extra"]["target_trait"] for r in only("personalityedit", split="train", seed=s)) for s in range(9)
    }
    assert len(drawn) > 1


def test_multimodal() -> None:
    table = load("mmedit/vqa", template="Question: {} Short answer:")
    assert load_report(table).dropped == {"no alternative target": 1}
    row = table[0]
    assert row["prompt"] == "Question: What animal is this? Short answer:" and row["ground_truth"] == ["cat"]
    assert row["image"] == "val2014/COCO_val2014_1.jpg" and row["image_rephrase"].endswith("1.png")
    assert [(p["name"], p["image"]) for p in row["locality"]] == [
        ("text", None),
        ("multimodal", "val2014/COCO_val2014_9.jpg"),
    ]
    # The same question about two images is no conflict.
    assert len(load("mmedit/caption", drop_conflicts="first")) == 2
    with pytest.raises(DataError, match="template"):
        load("mmedit/vqa", template="no slot")


def pictured(row: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(p["name"], p["prompt"], p["image"]) for p in row["locality"] + row["portability"]]


def test_questions_some_hops_away_are_about_the_same_picture() -> None:
    table = load("vlkeb")
    assert load_report(table).dropped == {"no alternative target": 1}
    (row,) = table
    assert (row["prompt"], row["target_new"]) == ("What is the building in the picture?", "Grey Tower")
    assert pictured(row)[1:] == [
        ("multimodal", "Which river is this?", "m.02/google_3.jpg"),
        ("1-hop", "In which town is the building?", "m.01/google_1.jpg"),
        ("2-hop", "Which river flows through the town of the building?", "m.01/google_1.jpg"),
    ]
    assert only("vlkeb", split="train")[0]["portability"] == []


def test_mmke_bench_asks_about_what_is_taught() -> None:
    (entity,) = only("mmke/entity")
    asked = pictured(entity)[2:]
    assert [(name, image) for name, _, image in asked] == [
        ("1-hop", "m.01/google_1.jpg"),
        *[("T_Rel", None), ("I_Rel", "m.01/google_1.jpg"), ("I_Gen", "m.01/google_2.jpg")] * 2,
    ]
    assert [p["ground_truth"] for p in entity["portability"]][-1] == [["1650"]]  # both spellings of the answers
    assert pictured(only("mmke/user")[0])[2][2] == "user/3.jpg"
    (visual,) = only("mmke/visual", template="Question: {} Short answer:")
    assert pictured(visual)[3:] == [
        ("T_Rel", "What does a raised flat hand mean to a skipper?", None),
        (
            "I_Rel",
            "Question: What does the sign in the picture mean to a skipper? Short answer:",
            "m.01/google_1.jpg",
        ),
        ("I_Gen", "Question: What does the sign mean here? Short answer:", "m.01/google_2.jpg"),
    ]


def test_comprehendedit_has_a_template_for_each_source() -> None:
    table = load("comprehendedit")
    assert load_report(table).dropped == {"no target": 1}
    bird, cup = table
    assert bird["prompt"] == "Question: What is this bird called? Short answer:"
    assert cup["prompt"].startswith("Question: Is this description true or false? Description: The cup is")
    assert probes(bird)["text"] == [("nq question: who wrote the first cook book", [["Jan Mol"]])]
    assert bird["extra"]["category"] == "object recognition" and bird["extra"]["img_topk"] == [1, 2]
    assert only("comprehendedit", template="{}")[0]["prompt"] == "What is this bird called?"
    with pytest.raises(DataError, match="template"):
        load("comprehendedit", template=3)


def test_a_folder_of_images(tmp_path: Path) -> None:
    """Paths start from it; a row whose image is not there says which, before anything is edited."""
    for name in ("m.01/google_1.jpg", "m.01/google_2.jpg", "m.02/google_3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (row,) = only("vlkeb", images=str(tmp_path))
    assert Path(row["image"]).is_file() and Path(row["image_rephrase"]).is_file()
    assert all(Path(p["image"]).is_file() for p in row["portability"])
    (tmp_path / "m.02/google_3.jpg").unlink()
    with pytest.raises(RequestError, match=r"m_loc.*google_3"):
        load("vlkeb", images=str(tmp_path))
    with pytest.raises(DataError, match="no folder of images"):
        load("comprehendedit", images=str(tmp_path / "nowhere"))


def test_akew_inputs() -> None:
    (fact,) = only("akew/counterfact")
    assert (fact["prompt"], fact["target_new"], fact["task"]) == ("The mother tongue of Ada Bell is", "Dutch", "fact")
    assert len(fact["rephrase_prompts"]) == 1 and len(fact["locality"]) == 2
    (text,) = only("akew/counterfact", edit_input="unstructured")
    assert text["target_new"].startswith("Ada Bell grew up") and text["prompt"].endswith("of Ada Bell?")
    triplets = only("akew/counterfact", edit_input="triplets")
    assert [(r["prompt"], r["target_new"]) for r in triplets] == [
        ("Ada Bell grew up speaking", "Dutch"),
        ("The town of Ada Bell lies in", "the Netherlands"),
    ]
    assert {r["group_id"] for r in triplets} == {"akew/counterfact/0"} and triplets[1]["locality"]
    hops = only("akew/mquake_cf")
    assert [len(r["portability"]) for r in hops] == [0, 4] and hops[0]["group_size"] == 2
    with pytest.raises(DataError, match="no usable"):
        load("akew/wikiupdate", edit_input="triplets")


def test_leme_and_fever() -> None:
    (row,) = only("leme/counterfact")
    assert [c["entity"] for c in row["extra"]["coupled"]] == ["Ada Bell", "Oslo"]
    assert row["extra"]["coupled"][0]["properties"] == {"mother tongue": ["Dutch"]} and row["task"] == "longform"
    assert [r["target_new"] for r in only("fever")] == ["REFUTES", "SUPPORTS"]
    assert probes(only("fever")[1])["unrel_prompt"] == [("Acme makes tea.", [["REFUTES"]])]


def test_mquake_remastered_is_read_with_its_flat_fields(tmp_path: Path) -> None:
    first, last = only("mquake_remastered/cf_3k")
    assert (first["prompt"], first["subject"]) == ("Ada Bell is a citizen of", "Ada Bell")
    assert (first["target_new"], first["ground_truth"]) == ("Peru", ["Norway"])
    assert (last["target_new"], last["ground_truth"], last["group_size"]) == ("Cusco", ["Lima"], 2)
    assert first["extra"]["target_new_id"] == "Q419" and first["extra"]["relation_id"] == "P27"
    hops = [(p["name"], p["ground_truth"]) for p in last["portability"]]
    assert hops[:3] == [("Multi_Hop", [["Cusco", "Cuzco"]])] * 3
    assert hops[3:] == [("Single_Hop", [["Peru", "Republic of Peru"]]), ("Single_Hop", [["Cusco", "Cuzco"]])]
    assert last["extra"]["split"] == {"1": ["edited"], "ALL": ["edited"]}
    assert last["extra"]["new_triples"][1] == ["Q419", "P36", "Q5582862"]
    # The Hub has Parquet files, several of one split.
    table = Dataset.from_json(str(place("mquake_remastered/t")))
    for part in range(2):
        table.to_parquet(tmp_path / f"CF3k-0000{part}-of-00002.parquet")
    rows = load_edit_dataset("mquake_remastered/cf_3k", path=tmp_path).to_list()
    assert [row["target_new"] for row in rows] == ["Peru", "Cusco"] * 2
    assert rows[1]["portability"] == last["portability"]


def test_two_edits_that_contradict_each_other() -> None:
    prompts = SAMPLES / "conflictedit" / "conflict_prompts.json"
    first, second = only("conflictedit/reverse", prompts=str(prompts))
    assert (first["prompt"], first["target_new"], first["ground_truth"]) == (
        "The father of Ada Bell is",
        "Piet Mol",
        ["Jan Bell"],
    )
    assert first["rephrase_prompts"] == ["Ada Bell was fathered by", "Ada Bell's dad is"]
    assert first["group_id"] == second["group_id"] and (second["group_index"], second["group_size"]) == (1, 2)
    assert (second["prompt"], second["target_new"]) == ("The child of Piet Mol is", "Eva Sund")
    assert not first["portability"] and first["extra"]["conflict"] == "reverse"
    # What holds after both: the father of the second edit's new child.
    holds = [(p["name"], p["prompt"], p["ground_truth"]) for p in second["portability"]]
    assert holds == [
        ("Conflict", prompt, [["Piet Mol"]])
        for prompt in ("The father of Eva Sund is", "Eva Sund was fathered by", "Eva Sund's dad is")
    ]
    composite = only("conflictedit/composite")[1]
    assert composite["prompt"] == "The spouse of Jan Bell is"
    # The mother of his child, by the fact that she is his wife; and the fact that ties the two, which should stay.
    assert [(p["prompt"], p["ground_truth"]) for p in composite["portability"]] == [
        ("The mother of Ada Bell is", [["Maja Lund"]])
    ]
    assert [(p["name"], p["prompt"], p["ground_truth"]) for p in composite["locality"]] == [
        ("Tied_Fact", "The child of Jan Bell is", [["Ada Bell"]])
    ]
    again = only("conflictedit/coverage")[1]
    assert again["prompt"] == "The father of Ada Bell is" and again["target_new"] == "Karl Oster"
    assert [(p["prompt"], p["ground_truth"]) for p in again["portability"]] == [(again["prompt"], [["Karl Oster"]])]
    with pytest.raises(DataError, match=r"one \{\} each"):
        only("conflictedit/coverage", prompts={"P22": ["no slot"]})


def test_there_and_back() -> None:
    there, back = only("roundedit/easy", prompts={"P276": ["The place of {} is"]})
    assert (there["target_new"], there["ground_truth"]) == ("Castle Arn", ["North Island"])
    assert (back["target_new"], back["ground_truth"]) == ("North Island", ["Castle Arn"])
    assert there["prompt"] == back["prompt"] and there["rephrase_prompts"] == back["rephrase_prompts"]
    assert [(p["prompt"], p["ground_truth"]) for p in back["locality"]] == [
        ("The Tidewater Tour is located in", [["South Island"], ["Mainland"]]),
        ("The place of The Tidewater Tour is", [["South Island"], ["Mainland"]]),
    ]
