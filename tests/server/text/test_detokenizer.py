"""Pieces of text: they join to the decoded text, break no character, and end at stop strings however they are cut."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.text.detokenizer import Detokenizer, StopStrings
from server.text.tokenizer import Tokenizer
from tests.factories import EOS_ID, make_tokenizer, save_tokenizer

TOKENIZER = make_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def by_byte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """Every byte is a token, as in GPT-2's alphabet."""
    path = tmp_path_factory.mktemp("bytes")
    save_tokenizer(path)
    tokenizer = Tokenizer(path)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """LLaMA-2's kind: words, and a token for each byte of what is no word."""
    path = tmp_path_factory.mktemp("fallback")
    words = ["<unk>", "▁Once", "▁upon", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(path)
    tokenizer = Tokenizer(path)
    yield tokenizer
    tokenizer.close()


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def fallback_ids(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [detokenizer.push(token_id) for token_id in token_ids]


@given(TEXTS, TEXTS)
def test_pieces_join_to_the_text_and_break_no_character(by_byte: Tokenizer, text: str, prompt: str) -> None:
    parts = pieces(by_byte, encode(text), encode(prompt))
    assert "".join(parts) == text
    assert all("\ufffd" not in part or "\ufffd" in text for part in parts)


@given(st.lists(st.integers(0, EOS_ID), max_size=32))
@example(encode("é") + [EOS_ID])
@example([encode("é")[0], EOS_ID, encode("é")[1]])
@example(TOKENIZER.convert_tokens_to_ids(["í", "ł"]))  # ED A0: a surrogate
def test_an_incomplete_last_character_is_dropped_and_nothing_else(by_byte: Tokenizer, token_ids: list[int]) -> None:
    written = b"".join(map(by_byte.text_bytes, token_ids))
    incomplete = next((size for size in (3, 2, 1) if begins_a_character(written[-size:])), 0)
    # Other invalid bytes are U+FFFD, as in any decoder.
    assert "".join(pieces(by_byte, token_ids)) == written[: len(written) - incomplete].decode(errors="replace")


def begins_a_character(begun: bytes) -> bool:
    """Whether bytes can follow that make it one character."""
    for size in (1, 2, 3):
        for rest in product((0x80, 0x90, 0xA0), repeat=size):
            try:
                if len((begun + bytes(rest)).decode()) == 1 and begun:
                    return True
            except UnicodeDecodeError:
                continue
    return False


@pytest.mark.parametrize("text", ["é", "a€", "x😀", "\ufffd", "a\ufffdb\ufffd😀"])
def test_text_that_is_cut_within_a_character_ends_before_it(by_byte: Tokenizer, text: str) -> None:
    ids = encode(text)
    for length in range(len(ids) + 1):
        expected = text.encode()[:length].decode(errors="ignore")
        assert "".join(pieces(by_byte, ids[:length])) == expected
        assert "".join(pieces(by_byte, ids[1:length], ids[:1])) == expected.removeprefix("".join(pieces(by_byte, ids[:1])))


@pytest.mark.parametrize("prompt", ["", "Once", "😀", "ありがとう"])
def test_neighbouring_characters_of_several_byte_tokens_come_whole(fallback: Tokenizer, prompt: str) -> None:
    """The decoder shows U+FFFD for each byte of a run of byte tokens that is not valid yet."""
    text = "é😀😀€"
    ids = fallback_ids(text)
    for length in range(len(ids) + 1):
        parts = pieces(fallback, ids[:length], [1, *fallback_ids(prompt)])
        assert "".join(parts) == text.encode()[:length].decode(errors="ignore")


def test_a_character_that_began_in_the_prompt_is_completed(by_byte: Tokenizer) -> None:
    first, *rest = encode("é")
    assert "".join(pieces(by_byte, rest, [*encode("caf"), first])) == "é"


def test_bytes_that_are_no_character_are_not_held_back(by_byte: Tokenizer) -> None:
    continuation = encode("é")[1]
    assert pieces(by_byte, [continuation] * 40) == ["\ufffd"] * 40


def test_sentencepiece_keeps_the_space_between_prompt_and_output(fallback: Tokenizer) -> None:
    assert pieces(fallback, [2, 3, 1], [1]) == [" upon", " a", " Once"]


def test_a_character_over_two_tokens_of_which_the_first_is_more(tmp_path: Path) -> None:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, e2, rest = "Ġ", "â", ["Ĥ", "¬"]  # the bytes 20, E2, 82 and AC of " €", as GPT-2 writes them
    vocab = {symbol: place for place, symbol in enumerate([*symbols, space + e2, "".join(rest)])}
    backend = Backend(models.BPE(vocab=vocab, merges=[(space, e2), (rest[0], rest[1])]))
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    begun, ended = vocab[space + e2], vocab["".join(rest)]
    assert pieces(tokenizer, [begun, ended]) == [" ", "€"]
    assert pieces(tokenizer, [begun, vocab[rest[0]], vocab[rest[1]]]) == [" ", "", "€"]
    tokenizer.close()


def by_definition(text: str, stops: Sequence[str], early: int = 0) -> tuple[str, bool]:
    """The text up to the stop string that is complete first when it is read character by character, after the first `early`."""
    for end in range(early + 1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


LETTERS = st.text("ab", max_size=24)


@given(
    text=LETTERS,
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 24), max_size=8),
    early=st.integers(0, 24),
)
@example(text="ab", stops=["a", "abb"], cuts=[1, 2], early=1)  # what is held contains a stop string that came early
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int], early: int) -> None:
    early = min(early, len(text))
    edges = sorted({0, early, len(text), *(min(cut, len(text)) for cut in cuts)})
    finder, shown, stopped = StopStrings(stops), "", False
    expected = by_definition(text, stops, early)
    for start, end in zip(edges, edges[1:], strict=False):
        piece, stopped = finder.push(text[start:end], early=end <= early)
        shown += piece
        # Nothing is shown that a stop string could still swallow, and nothing is held that none could.
        assert expected[0].startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += finder.flush()
    assert (shown, stopped) == expected


def test_text_is_held_only_while_it_may_become_a_stop_string() -> None:
    finder = StopStrings(["</end>"])
    assert finder.push("abc<") == ("abc", False)
    assert finder.push("/e") == ("", False)
    assert finder.push("x") == ("</ex", False)
    assert finder.push("</end> and more") == ("", True)


@pytest.mark.parametrize("save", [lambda tokenizer, path: tokenizer.save_pretrained(path)])
async def test_tokenizer_without_chat_template_uses_the_default_one(
    tmp_path: Path, save: Callable[[PreTrainedTokenizerFast, Path], None]
) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    save(plain, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = await tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>user: hi\nassistant:"
    tokenizer.close()


async def test_a_template_that_refuses_the_messages_is_a_value_error(tmp_path: Path) -> None:
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    strict.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="roles must alternate"):
        await tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    tokenizer.close()


@pytest.mark.parametrize("attack", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"])
async def test_templates_run_in_a_sandbox(tmp_path: Path, attack: str) -> None:
    hostile = make_tokenizer()
    hostile.chat_template = attack
    hostile.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="refuses"):
        await tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    tokenizer.close()


def test_a_directory_without_a_tokenizer_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        Tokenizer(tmp_path)
