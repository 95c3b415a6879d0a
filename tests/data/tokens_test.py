import hashlib
import json
import pickle
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.data.tokens import Tokenizer, load_tokenizer, train_tokenizer
from geode_jax.errors import UserError

NOUNS = ["chair", "table", "dining table", "bed", "tv-stand"]
TEMPLATES = [
    "How many {0}(s) are in this room?\nPlease answer with a number.",
    "Is the {0} to the left of the {1}, or is it 12 m away?",
    "Which is nearest to the {0}?\nOptions:\nA. {1}\nB. {2}\nC. none of these\nAnswer by letter.",
]
TEXTS = [
    template.format(*random.Random(i).sample(NOUNS, 3)) for i in range(60) for template in TEMPLATES
]
RARE = "A brown bedroom with one tablecloth; it's odd."
TOKENIZER = train_tokenizer([*TEXTS, " 2.4", " yes", RARE], NOUNS, min_count=5)


def pieces(text: str) -> list[str]:
    return [TOKENIZER.decode([i], skip_special=False) for i in TOKENIZER.encode(text)]


def test_constant_wording_is_one_token_and_nouns_and_digits_are_atoms():
    assert pieces(TEMPLATES[0].format("chair")) == [
        "How many",
        " chair",
        "(s) are in this room?\nPlease answer with a number.",
    ]
    assert pieces("Is the dining table to the left of the table, or is it 12 m away?") == [
        "Is the",
        " dining table",
        " to the left of the",
        " table",
        ", or is it",
        " 1",
        "2",
        " m away?",
    ]


def test_option_lines_stay_apart():
    assert pieces(TEMPLATES[2].format("bed", "chair", "tv-stand")) == [
        "Which is nearest to the",
        " bed",
        "?\nOptions:",
        "\nA.",
        " chair",
        "\nB.",
        " tv-stand",
        "\nC.",
        " none of these",
        "\nAnswer by letter.",
    ]


def test_rare_runs_are_spelled_by_words():
    # "bedroom" and "tablecloth" begin with nouns and are none.
    assert pieces("A brown bedroom with one tablecloth") == [
        "A",
        " brown",
        " bedroom",
        " with",
        " one",
        " tablecloth",
    ]
    assert pieces(" 2.4") == [" 2", ".", "4"]


def test_a_superword_does_not_match_inside_a_word():
    # "Is the" is a piece; "Is themselves" must not become "Is the" + "mselves".
    assert pieces("Is themselves")[0] == "Is"


def test_unknown_words_become_unk_and_the_rest_survives():
    assert pieces("Is the zebra to the left of the bed, or is it 7 m away?") == [
        "Is the",
        "<unk>",
        " to the left of the",
        " bed",
        ", or is it",
        " 7",
        " m away?",
    ]


def test_special_tokens_in_a_text_are_only_text():
    ids = TOKENIZER.encode("yes <eos> <pad>")
    assert TOKENIZER.eos_id not in ids and TOKENIZER.pad_id not in ids


KNOWN = st.lists(
    st.sampled_from(
        [" ", "\n", "\nA.", "7", " 7", "0.5", "?", " (", *NOUNS]
        + [f" {noun}" for noun in NOUNS]
        + [f" {word.strip(';.')}" for word in RARE.split() if "'" not in word]
        + TEXTS[:5]
    )
)


@given(KNOWN)
def test_roundtrip_of_known_words(parts):
    text = ""
    for part in parts:  # two words in a row would be a third, unknown one
        joins = text[-1:].isalpha() and part[:1].isalpha()
        text += " " + part if joins else part
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_encodes(text):
    ids = TOKENIZER.encode(text)
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.encode_batch([text, text]) == [ids, ids]
    assert isinstance(TOKENIZER.decode(ids), str)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8))
def test_training_never_crashes_and_knows_its_own_words(texts):
    tokenizer = train_tokenizer(texts * 2, ["x y"], min_count=2)
    for text in texts:
        assert tokenizer.unk_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_does_not_depend_on_the_order():
    again = train_tokenizer([RARE, " yes", " 2.4", *reversed(TEXTS)], NOUNS[::-1], min_count=5)
    assert again.sha256 == TOKENIZER.sha256


def test_save_load_and_pickle_keep_everything(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer")
    text = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == TOKENIZER.sha256
    for other in (Tokenizer.load(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(TOKENIZER))):
        assert other.sha256 == TOKENIZER.sha256 and other.vocab_size == TOKENIZER.vocab_size
        assert [other.encode(text) for text in TEXTS] == [TOKENIZER.encode(text) for text in TEXTS]
        assert (other.pad_id, other.bos_id, other.eos_id, other.unk_id) == (0, 1, 2, 3)


def test_transformers_loads_what_save_wrote(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in [*TEXTS[:9], RARE, "a zebra\n\n"]:
        ids = theirs(text)["input_ids"]
        assert ids == TOKENIZER.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids)
    assert theirs.eos_token_id == TOKENIZER.eos_id and theirs.pad_token_id == TOKENIZER.pad_id
    assert len(theirs) == TOKENIZER.vocab_size


def test_qwen_tokenizer_matches_its_golden_ids(tmp_path, data_root):
    folder = data_root / "qwen25_tokenizer"
    qwen = load_tokenizer(folder)
    for case in json.loads((folder / "golden_ids.json").read_text()):
        if "<|" not in case["text"]:  # special tokens in a text are read as text here
            assert qwen.encode(case["text"]) == case["ids"]
        assert qwen.decode(case["ids"], skip_special=False) == case["decoded"]
    assert qwen.vocab_size == 151_665
    assert (qwen.eos_id, qwen.pad_id, qwen.bos_id) == (151_645, 151_643, 151_643)
    assert qwen.sha256 == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    qwen.save(tmp_path)
    original, saved = folder / "tokenizer.json", tmp_path / "tokenizer.json"
    assert saved.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("broken", ["absent", "empty", "garbage"])
def test_a_bad_folder_is_refused_in_one_line(tmp_path, broken):
    folder = tmp_path / "tokenizer"
    if broken != "absent":
        folder.mkdir()
    if broken == "garbage":
        (folder / "tokenizer.json").write_text("{")
        (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_transformers_is_not_imported_for_our_own_tokenizer(tmp_path):
    TOKENIZER.save(tmp_path)
    code = (
        "import sys; from geode_jax.data.tokens import load_tokenizer;"
        f"load_tokenizer({str(tmp_path)!r}); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_training_is_fast():
    texts = [f"{text} {i}" for i in range(2000) for text in TEXTS[:100]]
    start = time.process_time()
    train_tokenizer(texts, NOUNS, min_count=50)
    assert time.process_time() - start < 20
