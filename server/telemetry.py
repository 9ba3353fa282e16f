"""One OpenTelemetry span per completion request. Imported only if traces are configured, because it needs the extra `otel`.

Attributes have the names of OpenTelemetry's semantic conventions for generative AI where these exist. Attributes of the routing
begin with `ladimo.routing.`. Spans never contain prompts, answers or keys.
"""

import threading
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue

import ladimo
from server import logs
from server.api.answers.generation import Delta, Generation
from server.api.fields.completions import GenerationFields
from server.api.http.failures import to_service_error

NANOSECONDS = 10**9
# The server waits for the collector at most this long when it ends.
CLOSE_SECONDS = 3


class Telemetry:
    """Creates the spans, through `provider`. `model`: the served model's name."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider, self._model = provider, model
        self._tracer = provider.get_tracer("ladimo", ladimo.__version__)

    async def follow(
        self, generation: Generation, operation: str, fields: GenerationFields, headers: Mapping[str, str]
    ) -> AsyncGenerator[Delta, None]:
        """Yield the generation's deltas inside a span. The span lasts from the request's arrival to the last delta.

        It continues the trace that the request's `traceparent` header names.
        """
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=propagate.extract(headers),
            kind=SpanKind.SERVER,
            start_time=generation.received,
            attributes={"gen_ai.operation.name": operation, **self._asked(generation, fields)},
        )
        first = True
        try:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    if first and fields.stream:
                        seconds = (time.time_ns() - generation.received) / NANOSECONDS
                        span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
                    first = False
                    yield delta
        except Exception as error:
            failure = to_service_error(error)
            span.set_attribute("error.type", failure.code)
            span.set_status(StatusCode.ERROR, str(failure))
            raise
        finally:
            _answered(span, generation)
            span.end()

    def close(self) -> None:
        """Send the remaining spans. Waits for the collector at most CLOSE_SECONDS."""
        sender = threading.Thread(target=self._provider.shutdown, daemon=True)
        sender.start()
        sender.join(CLOSE_SECONDS)

    def _asked(self, generation: Generation, fields: GenerationFields) -> dict[str, AttributeValue]:
        route = generation.route
        found: dict[str, AttributeValue | None] = {
            "gen_ai.provider.name": "ladimo",
            "gen_ai.request.model": fields.model or self._model,
            "gen_ai.request.max_tokens": generation.choices[0].request.sampling.max_tokens,
            "gen_ai.request.temperature": fields.temperature,
            "gen_ai.request.top_p": fields.top_p,
            "gen_ai.request.top_k": fields.top_k if fields.top_k > 0 else None,
            "gen_ai.request.seed": fields.seed,
            "gen_ai.request.presence_penalty": fields.presence_penalty or None,
            "gen_ai.request.frequency_penalty": fields.frequency_penalty or None,
            "gen_ai.request.choice.count": len(generation.choices) if len(generation.choices) > 1 else None,
            "gen_ai.request.stream": fields.stream,
            "gen_ai.response.id": generation.completion_id,
            "gen_ai.response.model": self._model,
            "openai.request.service_tier": fields.service_tier,
            "openai.response.service_tier": generation.service_tier,
            "ladimo.request_id": logs.request_id.get(),
            "ladimo.routing.requested": route.requested,
        }
        return {name: value for name, value in found.items() if value is not None}


def _answered(span: Span, generation: Generation) -> None:
    """Set the attributes that are known at the end, also after an error. The reason of an unfinished choice is "abort"."""
    usage, route = generation.usage, generation.route
    routing = {"policy": route.policy.name, "version": route.policy.version, "accuracy": route.accuracy, "reason": route.reason}
    if all(choice.experts_per_token for choice in generation.choices):  # otherwise no token has been measured yet
        routing = generation.routing
    span.set_attribute("gen_ai.response.finish_reasons", [choice.finish_reason or "abort" for choice in generation.choices])
    span.set_attribute("gen_ai.usage.input_tokens", usage["prompt_tokens"])
    span.set_attribute("gen_ai.usage.output_tokens", usage["completion_tokens"])
    span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage["prompt_tokens_details"]["cached_tokens"])
    for name, value in routing.items():
        if value is not None:
            span.set_attribute(f"ladimo.routing.{name}", value)


def connect(endpoint: str | None, model: str) -> Telemetry:
    """Send spans to the collector at `endpoint`, with OTLP over HTTP. None: OpenTelemetry's own environment variables name it.

    These variables also set headers, sampling and resource attributes.
    """
    ours = Resource.create({SERVICE_NAME: "ladimo-server", SERVICE_VERSION: ladimo.__version__})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    exporter = OTLPSpanExporter() if endpoint is None else OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Telemetry(provider, model)
