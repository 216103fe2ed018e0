"""What stands between a prompt and its target."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_kedit.text.joining import separator_between
from hf_kedit.tokens import separator_between as public

NOTHING = [
    # scripts without spaces: Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan; whatever follows
    ("我的年龄是", "23岁"),
    ("我的身高是", "188cm"),
    ("答案是「", "A"),
    ("中国的首都是", "《北京》"),
    ("他说“好”", "Yes"),
    ("日本の首都は", "Tokyo"),
    ("เมืองหลวงของประเทศไทยคือ", "กรุงเทพ"),
    ("เมืองหลวงคือ", "Bangkok"),
    ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", "ວຽງຈັນ"),
    ("រាជធានីនៃកម្ពុជាគឺ", "ភ្នំពេញ"),
    ("မြန်မာနိုင်ငံ၏မြို့တော်မှာ", "နေပြည်တော်"),
    ("བོད་ཀྱི་རྒྱལ་ས་ནི་", "ལྷ་ས།"),
    ("The capital of China is", "北京"),
    ("เมืองหลวงอยู่ที่นี่", "Bangkok"),
    ("そうた\u3099", "Tokyo"),
    ("Cafe\u0301", "'s menu"),
    ("e", "\u0301"),
    ("\u0301", "e"),
    # opened and not closed
    ('She said: "', "I"),
    ('She said:"', "I"),
    ("Sie sagte: „", "Ja"),
    ("Il dit «", "oui"),
    ("He said “", "no"),
    ("the 'a' and '", "b"),
    ("Paris (", "France"),
    ("[", "1]"),
    ("Spanish: ¿", "Dónde"),
    # signs that bind what follows
    ("The price is $", "20"),
    ("The price is €", "20"),
    ("It was -", "5 degrees"),
    ("plus or minus ±", "5"),
    ("3+3=", "6"),
    ("2*", "3"),
    ("and/", "or"),
    ("twenty-", "one"),
    ("5\u2212", "3"),
    ("3×", "4"),
    ("π≈", "3"),
    ("The answer is **", "Paris"),
    ("__", "Paris"),
    ("~~", "Paris"),
    ("1990–", "1995"),
    ("a word—", "another"),
    ("Trend: #", "love"),
    # inside addresses, paths, numbers
    ("See https://www.", "example.org"),
    ("https://example.org/?q=", "x"),
    ("Mail me@", "example.org"),
    ("C:\\", "Users"),
    ("/usr/", "bin"),
    ("Pi is 3.", "14"),
    ("They are 12,", "500"),
    ("At 10:", "30"),
    # closing punctuation and endings
    ("The capital of France is", ", of course, Rome"),
    ("Really", "?"),
    ("The capital is", "..."),
    ("(the capital", ")"),
    ("Ann", "'s book"),
    ("They", "’re here"),
    ("He is a 5", "-year-old"),
    ("It rose by 20", "%"),
    ("The site is example", ".com"),
    # white space, joiners, marks of chat templates, nothing
    ("is ", "Paris"),
    ("is\u00a0", "Paris"),
    ("is\n", "Paris"),
    ("is", " Paris"),
    ("zero\u200b", "width"),
    ("<｜User｜>Hi<｜Assistant｜>", "Hello"),
    ("<|user|>Hi<|assistant|>", "Hello"),
    ("", "Paris"),
    ("is", ""),
]
SPACE = [
    ("The capital is", "Paris"),
    ("프랑스의 수도는", "파리"),
    ("Столица Франции —", "Париж"),
    ("The capital is:", "Paris"),
    ("Question 5.", "Paris"),
    ("Answer to 5:", "Paris"),
    ("first,", "second"),
    ("3 + 3 =", "6"),
    ("5 -", "3"),
    ("if a <", "5"),
    ("a ->", "b"),
    ("an en dash –", "and"),
    ('He said "yes"', "and"),
    ("He said 'yes'", "and"),
    ("The dogs'", "bone"),
    ('A 15"', "screen"),
    ("It cost 20 €", "each"),
    ("It rose by 20%", "to"),
    ("**Answer:**", "Paris"),
    ("in Python 2 **", "3"),
    ("a ×", "b"),
    ("well \u2248", "5"),
    ("He programs in C++", "daily"),
    ("<b>bold</b>", "text"),
    ("See https://example.org", "for"),
    ("See https://example.org,", "and"),
    ("He works with", ".NET"),
    ("The temperature is", "-5"),
    ("and", "(so)"),
    ("Ann", "'quoted'"),
    ("Ann", '"quoted"'),
    ("He paid", "$20"),
    ("[INST] Hi [/INST]", "Hello"),
    ("Q: 首都?", "Paris"),
    # the last letter has a sign of its own on it
    ("भारत की राजधानी है", "दिल्ली"),
    ("हिन्दी", "भाषा"),
    ("Le cafe\u0301", "noir"),
    ("هذا كتابٌ", "جديد"),
    ("שָׁלוֹם לָךְ", "אמא"),
    ("I \u2764\ufe0f", "Paris"),
]


@pytest.mark.parametrize(("prompt", "target"), NOTHING)
def test_nothing(prompt: str, target: str) -> None:
    assert separator_between(prompt, target) == ""


@pytest.mark.parametrize(("prompt", "target"), SPACE)
def test_a_space(prompt: str, target: str) -> None:
    assert separator_between(prompt, target) == " "


@given(st.text(), st.text())
def test_any_texts_have_an_answer(prompt: str, target: str) -> None:
    assert separator_between(prompt, target) in ("", " ")


def test_it_is_what_the_library_uses() -> None:
    assert public is separator_between
