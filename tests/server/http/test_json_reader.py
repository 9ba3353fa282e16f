"""The stepping JSON reader says what Python's parser says, and refuses more."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.http import json_reader
from server.api.http.json_reader import MAX_DEPTH, MAX_VALUES, read_json

SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8")))
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(st.integers(0, 9), min_size=5, max_size=20),
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=4),
    ),
)
LAYOUT = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])


@settings(max_examples=60, deadline=None)
@given(value=JSON, layout=LAYOUT, piece=st.integers(2, 9))
def test_it_reads_what_was_written(value: object, layout: dict[str, Any], piece: int) -> None:
    usual = json_reader.PIECE
    json_reader.PIECE = piece
    try:
        assert read_json(json.dumps(value, **layout).encode()) == value
    finally:
        json_reader.PIECE = usual


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from('[]{},:"\\ \n019-.eEtruefalsn/*'), max_size=24))
def test_it_takes_what_python_takes(text: str) -> None:
    try:
        expected = json.loads(text, object_pairs_hook=list)
    except ValueError:
        with pytest.raises(ValueError, match=r".+"):
            read_json(text.encode())
    else:
        if "{" not in text:
            assert read_json(text.encode()) == expected or expected != expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Expecting value"),
        (b"[1,]", "Expecting value"),
        (b"[,1]", "Expecting value"),
        (b"[1,,2]", "Expecting value"),
        (b"[1 2]", "Expecting ','"),
        (b"[1, 2,", "Expecting value"),
        (b'{"a" 1}', "Expecting ':'"),
        (b'{"a": 1,}', "Expecting a name"),
        (b"{a: 1}", "Expecting a name"),
        (b"1 2", "Extra data"),
        (b"[1]]", "Extra data"),
        (b'["a', "Unterminated string"),
        (b'["\t"]', "control character"),
        (b"\xff", "utf-8"),
        (b"\xed\xa0\x80", "utf-8"),
        (b'["\\ud800"]', "surrogates"),
        (b'{"\\udfff": 1}', "surrogates"),
        (b"9" * 5000, "4300 digits"),
        (b'{"a": {"b": 1, "b": 2}}', "the name 'b' is there twice"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than"),
        (b'{"a":' * 100_000, "nested more than"),
        (b"[" + b"{}," * MAX_VALUES + b"1]", "more than"),
        (b"[" + b'"",' * MAX_VALUES + b"1]", "more than"),
        (b"[" + b"1,[]," * MAX_VALUES + b"1]", "more than"),
    ],
)
def test_it_refuses(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_json(body)


def test_what_is_just_allowed() -> None:
    assert read_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert len(read_json(b"[" + b"7," * (3 * MAX_VALUES) + b"7]")) == 3 * MAX_VALUES + 1
    assert read_json(b'\xef\xbb\xbf {"a": "\\ud83d\\ude00"} ') == {"a": "\U0001f600"}


def test_an_error_says_where() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        read_json(b'{"prompt": [1, 2, 3, oops, 4]}')
    assert caught.value.pos == 21
