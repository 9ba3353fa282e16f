"""Log-probabilities and echo in the forms of the two endpoints; token places across characters of several tokens.

The runner gives a generated token -0.5 and the next byte -1.5; at odd places of a prompt the byte before is the likelier.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.api.answers.generation import Echo, make_echo
from server.api.answers.logprobs import LEAST_LOGPROB, text_logprobs
from server.api.answers.logprobs import ScoredToken as Scored
from server.engine.request import TokenLogprobs
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer
from tests.factories import BOS, BOS_ID, EOS, EOS_ID, save_tokenizer
from tests.server.serving import Server, events, serving


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return next(token for token in range(256) if tokenizer.token_bytes(token) == bytes([byte]))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path / "tokenizer")
    return Tokenizer(tmp_path / "tokenizer")


async def test_every_token_has_its_bytes_and_a_text_without_replacement_characters(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.token_bytes(token) for token in range(256)]
    assert sorted(pieces) == [bytes([byte]) for byte in range(256)]
    assert (tokenizer.token_text(BOS_ID), tokenizer.token_text(EOS_ID)) == (BOS, EOS)
    ids = await tokenizer.encode("a é\n€😀", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "a é\n€😀"
    texts = [tokenizer.token_text(token) for token in ids]
    assert texts[:2] == ["a", " "]
    assert texts[2:4] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert not any("\ufffd" in text for text in texts)
    assert tokenizer.token_bytes(10**6) == b""
    tokenizer.close()


def test_a_sentencepiece_vocabulary_keeps_its_spaces_and_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁a", "▁hello", "llo", "<0xC3>", "<0xA9>", "▁"]
    backend = Backend(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.token_bytes(place) for place in (2, 3, 4, 5, 6)] == [b" hello", b"llo", b"\xc3", b"\xa9", b" "]
    tokenizer.close()


async def test_generated_tokens_have_parallel_arrays(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("a", max_tokens=3, logprobs=2, temperature=0)
        assert body["choices"][0]["logprobs"] == {
            "tokens": ["b", "c", "d"],
            "token_logprobs": [-0.5, -0.5, -0.5],
            "top_logprobs": [{"b": -0.5, "c": -1.5}, {"c": -0.5, "d": -1.5}, {"d": -0.5, "e": -1.5}],
            "text_offset": [0, 1, 2],
        }
        assert (await server.complete("a", max_tokens=2))["choices"][0]["logprobs"] is None
        none = (await server.complete("a", max_tokens=1, logprobs=0))["choices"][0]["logprobs"]
        assert none["top_logprobs"] == [{"b": -0.5}]


async def test_echo_gives_prompt_plus_one_entries_as_lm_eval_needs_them(tmp_path: Path) -> None:
    async with serving(tmp_path, max_step_tokens=2) as server:  # the prompt is computed in pieces
        ids = (await server.client.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False})).json()["tokens"]
        fields = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
        body = await server.complete([ids, [*ids, ids[0]]], **fields)
        assert [choice["text"] for choice in body["choices"]] == ["hellop", "hellohi"]
        for choice, length in zip(body["choices"], (6, 7), strict=True):
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values()} == {length}
            assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
            for place in range(1, length):
                value, top = logprobs["token_logprobs"][place], logprobs["top_logprobs"][place]
                assert top[logprobs["tokens"][place]] == value
                greedy = place % 2 == 0 or place == length - 1
                assert (max(top.values()) == value) is greedy
            assert logprobs["text_offset"] == list(range(length))


async def test_the_sampled_token_counts_even_when_it_ends_the_text(tmp_path: Path) -> None:
    async with serving(tmp_path, eos_token_ids=frozenset({66})) as server:
        body = await server.complete("ab", max_tokens=1, logprobs=1, echo=True)
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
        assert [len(values) for values in choice["logprobs"].values()] == [4, 4, 4, 4]  # BOS, a, b, and the end
        assert choice["logprobs"]["tokens"][0] == BOS
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


async def test_echo_alone_and_max_tokens_0(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        assert (await server.complete("hé", max_tokens=2, echo=True))["choices"][0]["text"].startswith("hé")
        body = await server.complete("hé", max_tokens=0, echo=True, logprobs=1, n=2)
        for choice in body["choices"]:
            assert (choice["text"], choice["finish_reason"]) == ("hé", "length")
            assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1]
            assert [value is None for value in choice["logprobs"]["token_logprobs"]] == [True, False, False, False]
        assert body["usage"] == {
            "prompt_tokens": 4,
            "completion_tokens": 0,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        (chunk,) = events(
            (
                await server.client.post(
                    "/v1/completions", json={"prompt": "hé", "max_tokens": 0, "echo": True, "stream": True}
                )
            ).text
        )
        assert (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) == ("hé", "length")
        reply = await server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 0})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "max_tokens")


def check_offsets(text: str, tokens: list[str], offsets: list[int]) -> None:
    """A token that is whole characters is found at its place; one that is part of a character is at that character."""
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        if token in (BOS, EOS):
            continue
        if token.startswith("bytes:"):
            byte = int(token.removeprefix("bytes:\\x"), 16)
            assert byte in text[offset].encode()
        else:
            assert text[offset : offset + len(token)] == token


async def test_places_of_characters_that_take_several_tokens(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("aé€\n😀b", max_tokens=2, logprobs=1, echo=True)
        logprobs = body["choices"][0]["logprobs"]
        assert logprobs["text_offset"] == [0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4, 4, 5, 6, 7]
        check_offsets(body["choices"][0]["text"], logprobs["tokens"], logprobs["text_offset"])


def test_a_character_that_the_prompt_begins_belongs_to_the_answer_that_ends_it(tokenizer: Tokenizer) -> None:
    ids = [byte_id(tokenizer, byte) for byte in "xé".encode()]
    begun, last = ids[:-1], ids[-1]
    assert make_echo(begun, tokenizer) == Echo("x", (0, 1))
    assert Detokenizer(tokenizer, begun).push(last) == "é"
    assert make_echo(ids, tokenizer) == Echo("xé", (0, 1, 1))
    tokenizer.close()


@given(ids=st.lists(st.integers(0, 255), min_size=2, max_size=14), part=st.integers(1, 13))
@example(ids=[156, 94, 94, 94, 94, 0], part=5)  # the last four tokens of the prompt begin within a character
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_prompt_and_answer_join_to_the_text_of_all_tokens(tokenizer: Tokenizer, ids: list[int], part: int) -> None:
    part = min(part, len(ids) - 1)  # an answer has at least one token
    prompt, answer = ids[:part], ids[part:]
    echo, detokenizer = make_echo(prompt, tokenizer), Detokenizer(tokenizer, prompt)
    text = echo.text + "".join(map(detokenizer.push, answer))
    assert text == make_echo(ids, tokenizer).text
    assert tokenizer.decode(ids).removeprefix(text) in ("", "\ufffd")  # a character that is not complete


async def test_an_answer_that_is_cut_within_a_character_ends_before_it(tmp_path: Path) -> None:
    """What follows the byte C2 in the runner's order is the beginning of one character after another."""
    async with serving(tmp_path) as server:
        begun = byte_id(server.services.language.tokenizer, 0xC2)
        fields = {"prompt": [byte_id(server.services.language.tokenizer, ord("a")), begun], "logprobs": 1, "echo": True}
        for max_tokens, text in ((0, "a"), (1, "a\ufffd"), (3, "a\ufffd\ufffd\ufffd")):
            fields["max_tokens"] = max_tokens
            whole = (await server.complete(**fields))["choices"][0]
            assert whole["text"] == text
            assert whole["logprobs"]["text_offset"] == [0, 1, *range(1, 1 + max_tokens)]
            chunks = await stream(server, "/v1/completions", fields)
            assert "".join(chunk["text"] for chunk in chunks) == text


async def stream(server: Server, path: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    reply = await server.client.post(path, json={**fields, "stream": True})
    return [chunk["choices"][0] for chunk in events(reply.text)]


@pytest.mark.parametrize("stop", [None, "ef", ["cdx", "gh"]])
async def test_streamed_log_probabilities_are_those_of_the_whole_answer(tmp_path: Path, stop: object) -> None:
    async with serving(tmp_path) as server:
        fields = {"prompt": "aé", "max_tokens": 6, "logprobs": 2, "echo": True, "stop": stop}
        whole = (await server.complete(**fields))["choices"][0]
        chunks = await stream(server, "/v1/completions", fields)
        assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        for name, values in whole["logprobs"].items():
            assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values
        assert [len(chunk["logprobs"]["tokens"]) for chunk in chunks] == [5] + [1] * (len(chunks) - 1)


async def test_text_held_back_by_a_stop_string_does_not_move_the_places(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        body = await server.complete("a", max_tokens=8, logprobs=0, stop=["def"])
        assert body["choices"][0]["text"] == "bc"
        assert body["choices"][0]["logprobs"]["tokens"] == ["b", "c", "d", "e", "f"]
        assert body["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


async def test_chat_log_probabilities(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        fields = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
        whole = (await server.client.post("/v1/chat/completions", json=fields)).json()["choices"][0]
        content = whole["logprobs"]["content"]
        # The prompt ends with a space, whose token the vocabulary lists before those of 0x7f and 0x80.
        assert [entry["token"] for entry in content] == ["\x7f", "bytes:\\x80"]
        assert content[0] == {
            "token": "\x7f",
            "logprob": -0.5,
            "bytes": [127],
            "top_logprobs": [
                {"token": "\x7f", "logprob": -0.5, "bytes": [127]},
                {"token": "bytes:\\x80", "logprob": -1.5, "bytes": [128]},
            ],
        }
        *chunks, end = await stream(server, "/v1/chat/completions", fields)
        assert end["logprobs"] is None
        assert [entry for chunk in chunks for entry in chunk["logprobs"]["content"]] == content
        plain = (await server.client.post("/v1/chat/completions", json={**fields, "top_logprobs": 0})).json()
        assert [entry["top_logprobs"] for entry in plain["choices"][0]["logprobs"]["content"]] == [[], []]


def test_tokens_of_the_same_text_keep_the_larger_value_and_nothing_is_infinite(tokenizer: Tokenizer) -> None:
    def text(token_id: int) -> str:
        return "same"

    tokenizer.token_text = text  # type: ignore[method-assign]
    scored = Scored(5, 0, TokenLogprobs(5, float("-inf"), ((4, -0.25), (3, -2.0))))
    assert text_logprobs([scored], tokenizer) == {
        "tokens": ["same"],
        "token_logprobs": [LEAST_LOGPROB],
        "top_logprobs": [{"same": -0.25}],
        "text_offset": [0],
    }
    tokenizer.close()
