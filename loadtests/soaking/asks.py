"""The requests of a soak test: every endpoint, routing and constraint, whole and streamed, right and wrong."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtests.soaking.ledger import HIDDEN

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
CITIES = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "description": "The weather of a city", "parameters": CITIES}
THINK = [{"policy": "fast", "until": "e"}, {"accuracy": 1.0}]
FOLLOWING = [{"policy": "auto", "until": "e"}, {"policy": "full", "min_accuracy": 0.3}]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `requested`: what it asks for, in the terms of `ladimo_policy_requests_total`. `refused`: the code of the
    error that it must get; None: an answer. `late`: it may also fail because of its deadline. `choices`: how many each prompt
    gets. `check`: raises AssertionError if the JSON of a whole answer is wrong."""

    kind: str
    path: str
    body: dict[str, Any] | bytes
    requested: str = "default"
    headers: dict[str, str] = field(default_factory=dict)
    refused: str | None = None
    late: bool = False
    choices: int = 1
    check: Callable[[dict[str, Any]], None] = lambda answer: None

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    @property
    def streams(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


class Asks:
    """Draws requests. `text`: what prompts are cut from. `model`: the served name. `longest`: of answers, in tokens."""

    def __init__(self, chance: random.Random, text: str, model: str, longest: int) -> None:
        self._chance, self._text, self._model, self._longest = chance, text, model, longest
        self._kinds = {
            self._completion: 6,
            self._routed: 6,
            self._chat: 3,
            self._response: 2,
            self._in_phases: 3,
            self._structured: 2,
            self._tools: 2,
            self._scored: 1,
            self._stopped: 2,
            self._late: 1,
            self._wrong: 3,
        }

    def draw(self) -> Ask:
        (kind,) = self._chance.choices([*self._kinds], [*self._kinds.values()])
        return kind()

    def plain(self) -> Ask:
        """A short answer under the default."""
        return Ask("plain", COMPLETIONS, {"prompt": self._prompt(), "max_tokens": 2})

    def long_stream(self, policy: str) -> Ask:
        """A stream that lasts, for a client that leaves in the middle of it."""
        body = self._body(COMPLETIONS, max_tokens=self._longest, ignore_eos=True, stream=True, routing=policy)
        return Ask("left", COMPLETIONS, body, policy)

    def _prompt(self) -> str:
        length = self._chance.randint(1, 120)
        start = self._chance.randrange(len(self._text) - length)
        return self._text[start : start + length]

    def _body(self, path: str, **fields: Any) -> dict[str, Any]:
        chance, stream = self._chance, self._chance.random() < 0.5
        tokens = {"max_output_tokens" if path == RESPONSES else "max_tokens": chance.randint(1, self._longest)}
        match path:
            case "/v1/completions":
                asked: dict[str, Any] = {"prompt": self._prompt()}
            case "/v1/chat/completions":
                asked = {"messages": [{"role": "user", "content": self._prompt()}]}
            case _:
                asked = {"input": self._prompt()}
        body = {**asked, **tokens, "temperature": chance.choice([0, 0.8]), "stream": stream, **fields}
        if body["stream"] and path != RESPONSES:
            body["stream_options"] = {"include_usage": True}
        return body

    def _completion(self) -> Ask:
        choices = self._chance.choice([1, 1, 1, 3])
        prompt = self._chance.choice([self._prompt(), [self._prompt(), self._prompt()]])
        body = self._body(COMPLETIONS, prompt=prompt, n=choices, ignore_eos=self._chance.random() < 0.5)
        return Ask("completion", COMPLETIONS, body, choices=choices)

    def _routed(self) -> Ask:
        """A policy, an accuracy or a condition, in one of the places where a request may name it."""
        name, accuracy = self._chance.choice(["full", "quality", "balanced", "fast"]), round(self._chance.random(), 2)
        floor = round(self._chance.random(), 2)
        routing, headers, fields, requested = self._chance.choice(
            [
                (name, {}, {}, name),
                ({"accuracy": accuracy}, {}, {}, "accuracy"),
                ({"accuracy": 1, "min_accuracy": floor}, {}, {}, "accuracy"),
                ({"policy": name, "min_accuracy": floor}, {}, {}, name),
                ("auto", {}, {}, "auto"),
                ({"policy": "auto", "min_accuracy": floor}, {}, {}, "auto"),
                (None, {"X-Routing-Policy": name}, {}, name),
                (None, {"X-Routing-Accuracy": str(accuracy)}, {}, "accuracy"),
                (None, {}, {"model": f"{self._model}:{name}"}, name),
                (None, {}, {"service_tier": "flex"}, "fast"),
            ]
        )
        body = self._body(COMPLETIONS, routing=routing, **fields)
        return Ask("routed", COMPLETIONS, body, requested, headers)

    def _chat(self) -> Ask:
        return Ask("chat", CHAT, self._body(CHAT, n=2, top_p=0.9), choices=2)

    def _response(self) -> Ask:
        return Ask("responses", RESPONSES, self._body(RESPONSES, instructions="Be brief."))

    def _in_phases(self) -> Ask:
        prompt_first = [{"policy": "full", "until": "prefill"}, {"policy": "fast", "until": "decode"}]
        phases = self._chance.choice([THINK, FOLLOWING, prompt_first])
        return Ask("phases", COMPLETIONS, self._body(COMPLETIONS, routing={"phases": phases}), "phases")

    def _structured(self) -> Ask:
        def check(answer: dict[str, Any]) -> None:
            (choice,) = answer["choices"]
            if choice["finish_reason"] == "stop":
                assert set(json.loads(choice["message"]["content"])) == {"city", "days"}

        form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITIES, "strict": True}}
        body = self._body(CHAT, max_tokens=self._longest, response_format=form)
        return Ask("structured", CHAT, body, check=check)

    def _tools(self) -> Ask:
        """Forced calls end when the call is complete. The engine may draw a token more."""

        def check(answer: dict[str, Any]) -> None:
            (choice,) = answer["choices"]
            assert choice["finish_reason"] in ("tool_calls", "length")
            for call in choice["message"].get("tool_calls") or ():
                if choice["finish_reason"] == "tool_calls":
                    assert set(json.loads(call["function"]["arguments"])) == {"city", "days"}

        tools = [{"type": "function", "function": WEATHER}]
        forced = {"type": "function", "function": {"name": "weather"}}
        body = self._body(CHAT, max_tokens=self._longest, tools=tools, tool_choice=forced, routing=HIDDEN)
        return Ask("tools", CHAT, body, HIDDEN, check=check)

    def _scored(self) -> Ask:
        """As lm-evaluation-harness asks. The engine draws a token, which is not shown."""
        body = self._body(COMPLETIONS, max_tokens=0, echo=True, logprobs=2, stream=False, routing=HIDDEN)
        return Ask("scored", COMPLETIONS, body, HIDDEN)

    def _stopped(self) -> Ask:
        """The engine may have drawn further tokens before it hears of a stop string."""
        return Ask("stopped", COMPLETIONS, self._body(COMPLETIONS, stop=["e", "\n"], routing=HIDDEN), HIDDEN)

    def _late(self) -> Ask:
        headers = {"X-Request-Timeout": self._chance.choice(["0.001", "0.05", "0.5"])}
        body = self._body(COMPLETIONS, max_tokens=self._longest, ignore_eos=True, routing=HIDDEN)
        return Ask("deadline", COMPLETIONS, body, HIDDEN, headers, late=True)

    def _wrong(self) -> Ask:
        """A request that must be refused, with the code of its error."""
        good = self._body(COMPLETIONS, stream=False)
        asks: list[tuple[dict[str, Any] | bytes, str]] = [
            (b'{"prompt": "a", ', "invalid_request"),
            (b"[]", "invalid_request"),
            ({**good, "prompt": "a" * 20_000, "max_tokens": 1}, "context_length_exceeded"),
            ({**good, "prompt": [[10**9]]}, "invalid_request"),
            ({**good, "temperature": "hot"}, "invalid_request"),
            ({**good, "routing": "no-such-policy"}, "unknown_policy"),
            ({**good, "routing": {"phases": [{"policy": "fast"}, {"policy": "full"}]}}, "invalid_request"),
            ({**good, "model": "no-such-model"}, "model_not_found"),
            ({**good, "suffix": "b"}, "unsupported_parameter"),
            ({**good, "structured_outputs": {"json": {"type": "no-such-type"}}}, "invalid_request"),
        ]
        if self._chance.random() < 0.1:
            return Ask("wrong", "/v1/no-such-route", good, refused="not_found")
        body, code = self._chance.choice(asks)
        return Ask("wrong", COMPLETIONS, body, refused=code)
