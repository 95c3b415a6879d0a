import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from geode_jax.data.control import BOX, REG
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
    # "bedroom" and "tablecloth" begin with nouns but are not nouns of the list.
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


def test_an_answer_has_one_space_before_it_whoever_puts_it_there():
    """Llama's tokenizers add one before every text; the older ones even before another space."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "l": 3, "a": 4, "▁l": 5, "▁la": 6, "▁a": 7}
    merges = [("▁", "l"), ("▁l", "a"), ("▁", "a")]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True)
    )
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    backend.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    older = Tokenizer(backend.to_str(), {"eos_token": "</s>"})
    assert older.encode(" la") == [2, 6]
    assert older.encode_answers(["la", "a"]) == [[6], [7]]
    backend.normalizer = None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    newer = Tokenizer(backend.to_str(), {"eos_token": "</s>"})
    assert newer.encode_answers(["la", "a"]) == [[6], [7]]
    assert TOKENIZER.encode_answers(["yes"]) == [TOKENIZER.encode(" yes")] != [[]]


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


@pytest.fixture(scope="module")
def qwen(data_root) -> Tokenizer:
    return load_tokenizer(data_root / "qwen25_tokenizer")


def test_qwen_tokenizer_matches_its_golden_ids(tmp_path, data_root, qwen):
    folder = data_root / "qwen25_tokenizer"
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


INTERNVL = [
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
]
CONTROLS = (REG, BOX)


def check_added(old: Tokenizer, new: Tokenizer, tokens, folder) -> None:
    """Asserts that `new` is `old` with the tokens added, also after saving, for both loaders."""
    transformers = pytest.importorskip("transformers")
    new.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    ids = [old.vocab_size + i for i in range(len(tokens))]
    for other in (new, load_tokenizer(folder)):
        assert [other.id_of(token) for token in tokens] == ids
        assert (other.sha256, other.vocab_size) == (new.sha256, ids[-1] + 1)
        assert (other.pad_id, other.bos_id, other.eos_id, other.unk_id) == (
            (old.pad_id, old.bos_id, old.eos_id, old.unk_id)
        )
        for text in [*TEXTS[:5], f" {tokens[-1]} is{''.join(tokens)}{tokens[0]}"]:
            assert other.encode(text) == old.encode(text)
            assert other.encode_batch([text]) == [old.encode(text)]
            assert other.encode_with_ends([text]) == old.encode_with_ends([text])
        text = old.encode("How many")
        assert other.decode([*ids, *text, ids[0]]) == old.decode(text)
        assert other.decode([ids[0]], skip_special=False) == tokens[0]
    assert theirs.convert_tokens_to_ids(list(tokens)) == ids


def test_added_tokens_take_the_next_ids_and_are_never_read_from_a_text(tmp_path):
    grown = TOKENIZER.with_tokens(CONTROLS)
    check_added(TOKENIZER, grown, CONTROLS, tmp_path)
    assert pickle.loads(pickle.dumps(grown)).id_of(BOX) == grown.id_of(BOX)
    assert TOKENIZER.decode([TOKENIZER.vocab_size]) == ""  # the old one is as it was


def test_tokens_that_are_there_keep_their_ids():
    once = TOKENIZER.with_tokens(CONTROLS)
    assert once.with_tokens(CONTROLS[::-1]).sha256 == once.sha256
    more = once.with_tokens(["<new>", CONTROLS[1], "<new>", "<eos>", "<newer>"])
    size = TOKENIZER.vocab_size
    assert [more.id_of(t) for t in (*CONTROLS, "<new>", "<newer>")] == [
        *range(size, size + 4),
    ]
    assert more.id_of("<eos>") == more.eos_id == TOKENIZER.eos_id
    assert TOKENIZER.id_of(" chair") == TOKENIZER.encode(" chair")[0]
    with pytest.raises(UserError, match="no token '<REG>'"):
        TOKENIZER.id_of("<REG>")


def test_ids_with_gaps_take_no_further_tokens(tmp_path):
    TOKENIZER.save(tmp_path)
    damaged(tmp_path, model__vocab__far=TOKENIZER.vocab_size + 5)
    gappy = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="ids have gaps, so <REG>, <3DBBOX> cannot follow"):
        gappy.with_tokens(CONTROLS)


WITH_CONTROLS = TOKENIZER.with_tokens([*INTERNVL, *CONTROLS])


@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
        | st.sampled_from([*INTERNVL, *CONTROLS, " ", "<", "REG", ">", *TEXTS[:3]])
    ).map("".join)
)
def test_no_text_encodes_to_a_control_token(text):
    ids = WITH_CONTROLS.encode(text)
    assert ids == TOKENIZER.encode(text)
    assert max(ids, default=0) < TOKENIZER.vocab_size


def test_qwen_with_internvls_tokens_and_ours(tmp_path, data_root, qwen):
    """The ids are those of InternVL2.5, and all are below the rows of Qwen2.5's embedding."""
    folder, tokens = data_root / "qwen25_tokenizer", [*INTERNVL, *CONTROLS]
    grown = qwen.with_tokens(tokens)
    assert [grown.id_of(token) for token in tokens] == list(range(151_665, 151_676))
    assert grown.id_of("<IMG_CONTEXT>") == 151_667 and grown.vocab_size <= 151_936
    check_added(qwen, grown, tokens, tmp_path)
    for case in json.loads((folder / "golden_ids.json").read_text()):
        if "<|" not in case["text"]:
            assert grown.encode(case["text"]) == case["ids"]
        assert grown.decode(case["ids"], skip_special=False) == case["decoded"]


def damaged(folder, name="tokenizer.json", **entries) -> None:
    """Sets entries of a file of a folder; a dotted name is nested, None removes it."""
    value = json.loads((folder / name).read_text())
    for path, entry in entries.items():
        *above, last = path.split("__")
        place = value
        for key in above:
            place = place[key]
        place[last] = entry
        if entry is None:
            del place[last]
    (folder / name).write_text(json.dumps(value))


def text_of(folder) -> str:
    return (folder / "tokenizer.json").read_text()


def replaced(folder, data: bytes, name="tokenizer.json") -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(data)


def linked(folder, target, name="tokenizer.json") -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(target)


def piped(folder, name) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def empty(folder) -> None:
    for path in folder.iterdir():
        path.unlink()


CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: replaced(f, text_of(f)[:200].encode()), "tokenizer.json: not JSON"),
        (lambda f: replaced(f, text_of(f).encode("utf-16")), "is UTF-16"),
        (lambda f: replaced(f, b"[" * 9999), "nested too deeply"),
        (lambda f: replaced(f, b"[]", CONFIG), f"{CONFIG}: must be a JSON object"),
        (empty, "no Hugging Face tokenizer"),
        (lambda f: damaged(f, model__vocab=[]), "tokenizer.json: damaged ("),
        (lambda f: damaged(f, model__vocab={}, added_tokens=[]), "tokenizer.json: "),
        (lambda f: damaged(f, model__vocab__table=2**32 - 1), "'table' has the id 4,294,967,295"),
        (lambda f: damaged(f, model__vocab__table=2**32), "tokenizer.json: damaged ("),
        (lambda f: damaged(f, model__vocab__table=9), " have the id 9"),
        (lambda f: damaged(f, model__unk_token="<no>"), "tokenizer.json: damaged ("),
        (lambda f: damaged(f, added_tokens=["<pad>"]), "tokenizer.json: damaged ("),
        (lambda f: damaged(f, CONFIG, eos_token="<end>"), "eos_token '<end>' is in no vocabulary"),
        (lambda f: damaged(f, CONFIG, eos_token=None), "eos_token is needed"),
        (lambda f: damaged(f, CONFIG, eos_token=[1]), "no Hugging Face tokenizer"),
        (lambda f: piped(f, "tokenizer.json"), "tokenizer.json: cannot be read: not a regular"),
        (lambda f: piped(f, CONFIG), f"{CONFIG}: cannot be read: not a regular file"),
        (lambda f: linked(f, "/etc/hostname"), "tokenizer.json: a link to /etc/hostname, out of"),
        (lambda f: linked(f, "/dev/zero", CONFIG), f"{CONFIG}: a link to /dev/zero, out of"),
        (lambda f: linked(f, "gone"), "tokenizer.json: cannot be read: No such file"),
        (lambda f: (f / "tokenizer.json").unlink(), "no Hugging Face tokenizer"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, said, tmp_path):
    folder = tmp_path / "tokenizer"
    TOKENIZER.save(folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    text = str(error.value)
    assert text.startswith(f"tokenizer {folder}: ") and said in text, text
    assert text.isprintable()


def test_no_code_of_a_folder_is_run_and_nothing_is_fetched(tmp_path, monkeypatch):
    TOKENIZER.save(tmp_path)
    mark = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    evil = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    entries = {"auto_map": evil, "tokenizer_class": "Evil", "pad_token": "<eos>"}
    damaged(tmp_path, CONFIG, **entries)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": evil}))

    def never(*_):
        raise AssertionError("asked, or fetched")

    monkeypatch.setattr("builtins.input", never)
    monkeypatch.setattr("socket.socket.connect", never)
    with pytest.raises(UserError, match="needs its own Python code, which is never run here"):
        load_tokenizer(tmp_path)
    damaged(tmp_path, CONFIG, tokenizer_class="PreTrainedTokenizerFast", auto_map=None)
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert not mark.exists()


def test_a_folder_whose_files_disagree_is_refused(tmp_path, data_root):
    """Qwen's class splits texts in its own way, without regard to tokenizer.json."""
    for path in (data_root / "qwen25_tokenizer").glob("tokenizer*.json"):
        shutil.copy(path, tmp_path)
    damaged(tmp_path, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True,
            "trim_offsets": False, "use_regex": True})  # fmt: skip
    with pytest.raises(UserError, match="encodes a text differently from tokenizer"):
        load_tokenizer(tmp_path)


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
