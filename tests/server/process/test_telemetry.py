"""One span per request, with OpenTelemetry's names, when it is configured and not otherwise."""

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from server.settings import read_settings
from server.telemetry import Telemetry
from tests.server.real import serving_model
from tests.server.serving import MODEL, Parts, Server, events, serving, serving_http

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Spans:
    """What was exported, in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.parts = Parts(telemetry=Telemetry(provider, MODEL))

    def take(self) -> ReadableSpan:
        (span,) = self.exporter.get_finished_spans()
        self.exporter.clear()
        return span


async def post(server: Server, path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    asked = {"prompt": "ab"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "ab"}]}
    return await server.client.post(path, json=asked | fields, headers=headers)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_span_says_what_the_answer_says(tmp_path: Path, path: str, stream: bool) -> None:
    spans = Spans()
    async with serving(tmp_path, spans.parts) as server:
        fields = {"max_tokens": 4, "n": 2, "seed": 7, "temperature": 0.5, "top_p": 0.9, "routing": {"accuracy": 0.4}}
        reply = await post(server, path, {"X-Request-Id": "mine"}, stream=stream, **fields)
        answer = events(reply.text)[-1] if stream else reply.json()
        span = spans.take()
        operation = "text_completion" if path == COMPLETIONS else "chat"
        assert (span.name, span.kind) == (f"{operation} {MODEL}", SpanKind.SERVER)
        assert span.start_time is not None and span.end_time is not None and span.start_time < span.end_time
        found = dict(span.attributes or {})
        routing = {f"ladimo.routing.{name}": value for name, value in answer["routing"].items()}
        assert routing.items() <= found.items()
        seconds: Any = found.pop("gen_ai.response.time_to_first_chunk", None)
        assert (seconds is not None and 0 < seconds < 60) if stream else seconds is None
        usage = {"prompt": found["gen_ai.usage.input_tokens"], "answer": found["gen_ai.usage.output_tokens"]}
        assert usage["answer"] == 8
        assert stream or usage["prompt"] == answer["usage"]["prompt_tokens"]
        assert {name: value for name, value in found.items() if name not in routing} == {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "ladimo",
            "gen_ai.request.model": MODEL,
            "gen_ai.request.max_tokens": 4,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.9,
            "gen_ai.request.seed": 7,
            "gen_ai.request.choice.count": 2,
            "gen_ai.request.stream": stream,
            "gen_ai.response.id": answer["id"],
            "gen_ai.response.model": MODEL,
            "openai.request.service_tier": "auto",
            "openai.response.service_tier": "default",
            "gen_ai.response.finish_reasons": ("length", "length"),
            "gen_ai.usage.input_tokens": usage["prompt"],
            "gen_ai.usage.output_tokens": 8,
            "gen_ai.usage.cache_read.input_tokens": 0,
            "ladimo.request_id": "mine",
            "ladimo.routing.requested": "accuracy",
        }
        standard = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
        assert {name for name in found if name.startswith("gen_ai.")} <= standard


async def test_the_callers_trace_goes_on(tmp_path: Path) -> None:
    spans = Spans()
    async with serving(tmp_path, spans.parts) as server:
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        await post(server, COMPLETIONS, {"traceparent": f"00-{trace}-{parent}-01"}, max_tokens=1)
        span = spans.take()
        assert span.context is not None and span.parent is not None
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (trace, parent)
        await post(server, COMPLETIONS, {"traceparent": "nonsense"}, max_tokens=1)
        assert spans.take().parent is None


async def test_a_failed_request_says_why(tmp_path: Path) -> None:
    spans = Spans()
    async with serving(tmp_path, spans.parts) as server:
        server.runner.fail_with = RuntimeError("broken")
        assert (await post(server, COMPLETIONS)).status_code == 503
        span = spans.take()
        found = span.attributes or {}
        assert span.status.status_code is StatusCode.ERROR
        assert found["error.type"] == "engine_dead"
        assert found["gen_ai.response.finish_reasons"] == ("abort",)
        assert found["ladimo.routing.policy"] == "full"
        assert found["gen_ai.usage.output_tokens"] == 0


async def test_a_client_that_leaves_ends_the_span(tmp_path: Path) -> None:
    spans = Spans()
    async with serving_http(tmp_path, spans.parts) as server:
        server.runner.let(3)
        body = {"prompt": "ab", "max_tokens": 30, "stream": True}
        async with server.client.stream("POST", COMPLETIONS, json=body) as reply:
            async for line in reply.aiter_lines():
                if line:
                    break
        await server.until(lambda: bool(spans.exporter.get_finished_spans()))
        span = spans.take()
        assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)
        assert span.status.status_code is StatusCode.UNSET  # the server did nothing wrong


@contextmanager
def collector() -> Iterator[tuple[str, "Queue[tuple[str, bytes]]"]]:
    """The address of an OTLP collector, and what it is sent: path and body."""
    sent: Queue[tuple[str, bytes]] = Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.put((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", sent
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("by", ["flag", "environment"])
async def test_spans_reach_a_collector(moe_dir: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the real exporter, and at the latest when the server ends."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with collector() as (address, sent):
        if by == "environment":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        flags = ("--otlp-endpoint", address) if by == "flag" else ()
        async with serving_model(moe_dir, *flags) as url, httpx.AsyncClient(base_url=url) as client:
            await client.post(COMPLETIONS, json={"prompt": "abc", "max_tokens": 2, "routing": "fast"})
        path, body = sent.get(timeout=10)
        assert path == "/v1/traces"
        for text in (b"text_completion model", b"ladimo.routing.policy", b"fast", b"gen_ai.usage.input_tokens", b"mine"):
            assert text in body


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        assert not read_settings(["model"]).exports_traces
    for name in ("LADIMO_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://localhost:4318")
            assert read_settings(["model"]).exports_traces
    with pytest.raises(ValueError, match="otlp-endpoint"):
        read_settings(["model", "--otlp-endpoint", "localhost:4318"])


@pytest.mark.long
def test_without_the_extra_nothing_is_missed_until_it_is_asked_for(moe_dir: Path) -> None:
    """Where OpenTelemetry's SDK is not installed the server works, and says what is missing when traces are configured."""
    script = """
import sys
sys.modules["opentelemetry.sdk"] = None  # importing it fails
from server.launch import build_services
from server.settings import read_settings
assert build_services(read_settings(sys.argv[1:2])).telemetry is None
try:
    build_services(read_settings(sys.argv[1:]))
except ValueError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(moe_dir), "--otlp-endpoint", "http://localhost:4318"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "traces need OpenTelemetry's SDK: pip install 'ladimo[otel]'"
