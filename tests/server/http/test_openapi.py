"""The OpenAPI page says what the server does, and schemathesis asks many questions of it."""

import asyncio
import json
import os
import sys
from pathlib import Path

import httpx
import pytest

from server.app import Access
from tests.server.real import serving_model
from tests.server.serving import serving

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
# With LONG_TESTS set, schemathesis also makes thousands of cases at and beyond the limits of each field.
SCOPE = ("--max-examples", "100") if os.environ.get("LONG_TESTS") else ("--max-examples", "3", "--phases", "fuzzing,stateful")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


async def test_every_route_is_described_with_its_errors(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        page = (await server.client.get("/openapi.json")).json()
        contract = {
            *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/v1/models/{model}", "/v1/routing"),
            *(
                "/tokenize",
                "/detokenize",
                "/tokenizer_info",
                "/version",
                "/health",
                "/health/live",
                "/health/ready",
                "/metrics",
            ),
            *("/admin/routing/policies/{name}", "/admin/routing/default", "/admin/routing/rollback", "/admin/drain"),
        }
        assert contract <= page["paths"].keys()
        for path in contract:
            for operation in page["paths"][path].values():
                assert "422" not in operation["responses"]
                schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}, path
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
            answers = page["paths"][path]["post"]["responses"]["200"]["content"]
            assert answers.keys() == {"application/json", "text/event-stream"}, path
        fields = page["components"]["schemas"]["CompletionRequest"]["properties"]
        assert {"prompt", "n", "logprobs", "echo", "routing", "structured_outputs"} <= fields.keys()


@pytest.mark.slow
async def test_schemathesis_finds_nothing(moe_dir: Path, tmp_path: Path) -> None:
    async with serving_model(moe_dir, "--max-model-len", "64", access=Access(open_admin=True)) as url:
        process = await asyncio.create_subprocess_exec(
            *(str(SCHEMATHESIS), "run", f"{url}/openapi.json", *SCOPE, "--checks", CHECKS),
            *("--exclude-path", "/admin/drain"),  # after which all others are answered 503
            *("--continue-on-failure", "--generation-database", "none", "--no-color"),
            *("--seed", "1"),  # other seeds are for a search by hand: a change must not fail by another draw
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        report = (await process.communicate())[0].decode()
        assert process.returncode == 0, report[-6000:]
        async with httpx.AsyncClient(base_url=url) as client:
            reply = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert json.loads(reply.text)["usage"]["completion_tokens"] == 1
