"""Pieces of text: they join to the decoded text, break no character, and end at stop strings however they are cut."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.text.detokenizer import MAX_HELD_TOKENS, Detokenizer, StopStrings
from server.text.tokenizer import Tokenizer
from tests.factories import EOS_ID, make_tokenizer

TOKENIZER = make_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
VALID_TEXTS = TEXTS.filter(lambda text: "\ufffd" not in text)


def decode(token_ids: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def pieces(token_ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(decode, prompt_ids)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(VALID_TEXTS, TEXTS)
def test_pieces_join_to_the_text_and_break_no_character(text: str, prompt: str) -> None:
    parts = pieces(encode(text), encode(prompt))
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, EOS_ID), max_size=MAX_HELD_TOKENS))
def test_pieces_join_to_what_decoding_gives_even_for_invalid_bytes(token_ids: list[int]) -> None:
    assert "".join(pieces(token_ids)) == decode(token_ids)


def test_a_real_replacement_character_is_text() -> None:
    assert "".join(pieces(encode("a\ufffdb\ufffd"))) == "a\ufffdb\ufffd"


def test_a_character_that_began_in_the_prompt_is_completed() -> None:
    first, *rest = encode("é")
    assert "".join(pieces(rest, [*encode("caf"), first])) == "é"


def test_bytes_that_never_become_text_are_not_held_for_ever() -> None:
    continuation = encode("é")[1]
    detokenizer = Detokenizer(decode)
    shown = "".join(detokenizer.push(continuation) for _ in range(10 * MAX_HELD_TOKENS))
    assert len(shown) >= 9 * MAX_HELD_TOKENS


def test_sentencepiece_keeps_the_space_between_prompt_and_output() -> None:
    words = {1: "▁Once", 2: "▁upon", 3: "▁a", 4: "▁time"}

    def decode_words(token_ids: Sequence[int]) -> str:
        return "".join(words[token_id] for token_id in token_ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(decode_words, [1])
    assert [detokenizer.push(token_id) for token_id in (2, 3, 4)] == [" upon", " a", " time"]
    assert detokenizer.flush() == ""


def by_definition(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text up to the stop string that is complete first when it is read character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


LETTERS = st.text("ab", max_size=24)


@given(
    text=LETTERS,
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(0, 24), max_size=8),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    finder, shown, stopped = StopStrings(stops), "", False
    for start, end in zip(edges, edges[1:], strict=False):
        piece, stopped = finder.push(text[start:end])
        shown += piece
        # Nothing is shown that a stop string could still swallow, and nothing is held that none could.
        assert by_definition(text, stops)[0].startswith(shown)
        if stopped:
            break
    if not stopped:
        shown += finder.flush()
    assert (shown, stopped) == by_definition(text, stops)


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
