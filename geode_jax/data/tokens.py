"""Tokenizers: a small superword tokenizer trained on the questions, or any Hugging Face tokenizer.

Templated questions repeat long phrases. The superword tokenizer gives such a phrase one id, so a
question takes 6 to 16 tokens instead of 60, while everything the answer depends on (nouns, digits,
option letters) keeps ids of its own. Both are stored as ordinary Hugging Face tokenizer folders.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from geode_jax.exports.files import (
    UserError,
    one_line,
    open_regular,
    read_json_object,
    read_text,
    refuse_foreign_link,
    write_json,
    write_text,
)

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_MIN_PARALLEL = 1000
"""Texts from which on a batch is encoded on all cores. For a scene's few texts that takes three
times the CPU time, and takes it from the training step on the same cores."""

# The smallest pieces: a digit, a word, a white space, a sign. All but the white space include the
# space before them, so that decoding is plain concatenation.
_UNIT = r" ?[0-9]| ?[\p{L}\p{M}]+|\s| ?[^\s\p{L}\p{M}0-9]"
_LETTER = r"[^\W\d_]"  # for Python's re, which has no \p{L}
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


class Tokenizer:
    """A tokenizer and the ids of the four special tokens that the trainer needs.

    `encode` adds no special ids: the pipeline places bos and eos itself. The names of special
    tokens in a text are encoded as ordinary text.

    Attributes:
        pad_id, bos_id, eos_id, unk_id: ids of the special tokens. Where a Hugging Face tokenizer
            lacks one: pad falls back to eos, bos to pad (Qwen's `<|endoftext|>`), unk to pad.
        vocab_size: largest id + 1, the number of rows of an embedding.
        sha256: hex digest of the `tokenizer.json` that `save` writes.
    """

    def __init__(self, tokenizer_json: str, special_tokens: dict[str, str]):
        """Args: tokenizer_json: text of a `tokenizer.json`. special_tokens: {"eos_token": ...}."""
        self._json = tokenizer_json
        self._special = dict(special_tokens)
        self._backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        _check_vocabulary(vocabulary, self._special)
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        eos = self._special["eos_token"]
        pad = self._special.get("pad_token") or eos
        self.eos_id = vocabulary[eos]
        self.pad_id = vocabulary[pad]
        self.bos_id = vocabulary[self._special.get("bos_token") or pad]
        self.unk_id = vocabulary[self._special.get("unk_token") or pad]

    def __reduce__(self):
        return Tokenizer, (self._json, self._special)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos or eos."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text; many texts are encoded on all cores."""
        if len(texts) < _MIN_PARALLEL:
            return [self.encode(text) for text in texts]
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of texts that follow a prompt, with one space before each.

        Llama's tokenizers add this space themselves, the older ones even if there is one already;
        a second space would not match the answers of a Llama teacher.
        """
        own = self._backend.encode("a", add_special_tokens=False).tokens[:1] or [""]
        space = "" if own[0].startswith("▁") else " "
        return self.encode_batch([space + text for text in texts])

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Returns (ids, end of every token in characters of the text) of every text."""
        found = (self._backend.encode(text, add_special_tokens=False) for text in texts)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in found]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decodes ids to text, without special tokens unless `skip_special` is False.

        Ids beyond the vocabulary (padding rows of an embedding) decode to nothing.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int:
        """Returns the id of a token.

        Raises:
            UserError: the vocabulary has no such token.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(f"tokenizer: no token {token!r}")
        return found

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """Returns this tokenizer with further special tokens.

        Args:
            tokens: special tokens. New ones get the next ids in this order; one that exists keeps
                its id.

        Raises:
            UserError: the existing ids have gaps, so the new ids would not be the next ones.
        """
        backend = tokenizers.Tokenizer.from_str(self._json)
        new = [t for t in dict.fromkeys(tokens) if backend.token_to_id(t) is None]
        backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        grown = Tokenizer(backend.to_str(), self._special)
        if [grown.id_of(t) for t in new] != [self.vocab_size + i for i in range(len(new))]:
            raise UserError(f"tokenizer: its ids have gaps, so {', '.join(new)} cannot follow them")
        return grown

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` loads."""
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e9),
            **self._special,
        }
        write_text(folder / "tokenizer.json", self._json)
        write_json(folder / "tokenizer_config.json", config)

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Same as `load_tokenizer`."""
        return load_tokenizer(folder)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a tokenizer folder, written by `Tokenizer.save` or any Hugging Face tokenizer.

    Args:
        folder: local folder; nothing is downloaded, and no code in it is ever run.

    Raises:
        UserError: the folder is missing, is no tokenizer folder, is damaged, needs its own Python
            code, or names no eos token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder")
    try:
        return _read_folder(folder)
    except UserError as error:
        raise UserError(f"tokenizer {folder}: {str(error).removeprefix(f'{folder}/')}") from None


_FILES = (".json", ".txt", ".jinja", ".model", ".spm", ".vocab", ".codes", ".tiktoken")
"""Endings of the files that a tokenizer may consist of."""
_OBJECTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "config.json"),
)
"""Those of them that transformers reads as JSON objects."""


def _read_folder(folder: Path) -> Tokenizer:
    objects = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _FILES and not path.is_dir():
            refuse_foreign_link(path)
            open_regular(path).close()  # reading a pipe would block transformers
            if path.name in _OBJECTS:
                objects[path.name] = read_json_object(path)
    config = objects.get("tokenizer_config.json", {})
    text = None
    if "tokenizer.json" in objects:
        text = read_text(folder / "tokenizer.json")
    ours = [config.get(f"{name}_token") for name in ("pad", "bos", "eos", "unk")]
    if text is not None and ours == [PAD, BOS, EOS, UNK]:
        tokenizer, _ = _tested(text, _specials(config.get))
        return tokenizer
    text, specials, expected = _through_transformers(folder, text)
    tokenizer, ids = _tested(text, specials)
    if ids != expected:
        raise UserError(
            "transformers encodes a text differently from tokenizer.json, because of "
            "tokenizer_config.json"
        )
    return tokenizer


def _through_transformers(folder: Path, text: str | None) -> tuple[str, dict[str, str], list[int]]:
    """Returns `tokenizer.json`, special tokens and ids of `_TEST_TEXT`, read by transformers."""
    from transformers import AutoTokenizer  # slow to import, and rarely needed
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with _refused("no Hugging Face tokenizer"):
        try:
            fast = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            text = text or fast.backend_tokenizer.to_str()
            expected = list(fast.encode(_TEST_TEXT, add_special_tokens=False))
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise UserError("needs its own Python code, which is never run here") from None
            raise
        finally:
            logging.set_verbosity(verbosity)
        specials = _specials(lambda name: getattr(fast, name, None))
    if "eos_token" not in specials:
        raise UserError("tokenizer_config.json: eos_token is needed")
    return text, specials, expected


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turns any error of a library about a damaged tokenizer into one line, `what` first."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what} ({one_line(reason[0], 200)})") from None


_TEST_TEXT = "How many chairs?\nA. 2.4 m \u00fc\u5b57\ue000\U0010fffd"
"""Words, digits, signs, and characters that few vocabularies have."""


def _tested(text: str, specials: dict[str, str]) -> tuple[Tokenizer, list[int]]:
    """Returns a tokenizer that encoded and decoded `_TEST_TEXT`, and the ids of that text."""
    with _refused("tokenizer.json: damaged"):
        tokenizer = Tokenizer(text, specials)
        ids = tokenizer.encode(_TEST_TEXT)
        tokenizer.decode(ids, skip_special=False)
    if any(i >= tokenizer.vocab_size for i in ids):
        raise UserError("tokenizer.json: damaged (it gives ids outside its vocabulary)")
    return tokenizer, ids


MAX_VOCABULARY = 1 << 24
"""Limit of the ids, each a row of the embedding; published vocabularies end at a million."""


def _check_vocabulary(vocabulary: dict[str, int], specials: dict[str, str]) -> None:
    """Refuses ids that are too large, ids of two tokens, and special tokens without an id."""
    if not vocabulary:
        raise UserError("tokenizer.json: no token")
    last = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[last] >= MAX_VOCABULARY:
        raise UserError(
            f"tokenizer.json: {last!r} has the id {vocabulary[last]:,}; ids end at "
            f"{MAX_VOCABULARY - 1:,}"
        )
    if len(set(vocabulary.values())) < len(vocabulary):
        tokens = {i: token for token, i in vocabulary.items()}
        token = next(token for token, i in vocabulary.items() if tokens[i] != token)
        both = f"{token!r} and {tokens[vocabulary[token]]!r}"
        raise UserError(f"tokenizer.json: {both} have the id {vocabulary[token]}")
    for name, token in specials.items():
        if token not in vocabulary:
            raise UserError(f"{name} {token!r} is in no vocabulary")


def _specials(get: Callable[[str], Any]) -> dict[str, str]:
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    found = {name: get(name) for name in names if get(name)}
    for name, token in found.items():
        if not isinstance(token, str):
            raise UserError(f"tokenizer_config.json: {name} must be text")
    return found


def train_tokenizer(texts: Iterable[str], nouns: Sequence[str], min_count: int) -> Tokenizer:
    """Trains a superword tokenizer.

    Nouns, digits and option markers (a new line with `A.`) are atoms: always one id each. The text
    between two atoms is a run; the end of an option's line also ends a run. A run that occurs at
    least `min_count` times gets one id, any other run is spelled by its words and signs. A word
    that occurs in no text becomes `<unk>`. Every known word has an id with and one without the
    space before it, so `decode(encode(x)) == x` for every text made of known words.

    Args:
        texts: prompts and answers (answers with the space that will precede them).
        nouns: words or phrases that are atoms, in lower case as in the texts.
        min_count: occurrences from which on a run gets one id.

    Returns:
        The tokenizer; its ids do not depend on the order of the texts.
    """
    atom = _atom_pattern(nouns)
    runs, markers = Counter(), set()
    for text, count in Counter(texts).items():
        marker = ""
        for i, piece in enumerate(atom.split(text)):
            if i % 2:
                marker = piece if piece[0] == "\n" else ""
                markers.add(marker)
            elif marker:  # an option ends with its line
                option, _, rest = piece.partition("\n")
                runs[option] += count
                runs["\n" + rest if rest else ""] += count
            else:
                runs[piece] += count
    runs.pop("", None)
    markers.discard("")

    units = pre_tokenizers.Split(Regex(_UNIT), "isolated")
    words, superwords = Counter(), Counter()
    for run, count in runs.items():
        spelled = [piece for piece, _ in units.pre_tokenize_str(run)]
        if len(spelled) > 1 and count >= min_count:
            superwords[run] = count
        for piece in spelled:
            words[piece.removeprefix(" ") or " "] += count
    for noun in nouns:
        for piece, _ in units.pre_tokenize_str(noun):
            words[piece.removeprefix(" ")] += 1

    atoms = [*"0123456789", *_PUNCTUATION, *sorted(set(nouns)), *_ranked(words)]
    vocabulary = [PAD, BOS, EOS, UNK, " ", "\n", "\t", *sorted(markers)]
    for piece in atoms:
        vocabulary += [piece] if piece.isspace() else [piece, " " + piece]
    vocabulary += _ranked(superwords)
    phrases = [noun for noun in nouns if len(units.pre_tokenize_str(noun)) > 1]
    long_pieces = [*markers, *superwords, *phrases, *(" " + noun for noun in phrases)]
    return Tokenizer(
        _word_level(dict.fromkeys(vocabulary), long_pieces).to_str(),
        {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK},
    )


def _atom_pattern(nouns: Sequence[str]) -> re.Pattern[str]:
    """Returns the pattern that splits a text into runs (even pieces) and atoms (odd pieces)."""
    # Longest first: Python's alternation takes the first match, so "table lamp" before "table".
    longest_first = sorted({re.escape(noun) for noun in nouns}, key=lambda n: (-len(n), n))
    atoms = [r" ?[0-9]", r"\n[A-Z]\."]
    if longest_first:
        atoms.append(rf"(?: |(?<!{_LETTER}))(?:{'|'.join(longest_first)})(?!{_LETTER})")
    return re.compile(f"({'|'.join(atoms)})")


def _ranked(counts: Counter) -> list[str]:
    return sorted(counts, key=lambda piece: (-counts[piece], piece))


def _word_level(vocabulary: Iterable[str], long_pieces: Iterable[str]) -> tokenizers.Tokenizer:
    """Returns a WordLevel tokenizer: a text is split into the longest known pieces, else units."""
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=UNK))
    pattern = "|".join([*_trie_patterns(long_pieces), _UNIT])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, BOS, EOS, UNK)])
    return tokenizer


def _trie_patterns(pieces: Iterable[str]) -> list[str]:
    """Returns [a pattern that matches the longest of the pieces], [] without pieces.

    The pattern is a trie, three times as fast as an alternation of the pieces. A piece that ends in
    a letter must not be followed by one ("the b" is no piece of "the bed"). Chains without a
    branch add no level, so the nesting stays far below Oniguruma's limit of 4096.
    """
    trie: dict = {}
    for piece in pieces:
        node = trie
        for char in piece:
            node = node.setdefault(char, {})
        node[""] = r"(?![\p{L}\p{M}])" if re.match(_LETTER, piece[-1]) else ""

    def pattern(node: dict) -> str:
        prefix = ""
        while len(node) == 1 and "" not in node:
            char, node = next(iter(node.items()))
            prefix += re.escape(char)
        branches = [re.escape(char) + pattern(node[char]) for char in sorted(node) if char]
        if not branches:
            return prefix + node[""]
        if "" in node:
            branches.append(node[""])
        return f"{prefix}(?:{'|'.join(branches)})"

    return [pattern(trie)] if trie else []
