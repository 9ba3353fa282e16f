"""The page at /, the API's page at /docs, and their files. The pages load nothing from other servers."""

from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, RedirectResponse, Response

from server.errors import NotFound

router = APIRouter(include_in_schema=False)

WEB = Path(__file__).parents[2] / "web"
SWAGGER_UI = ("swagger-ui.css", "swagger-ui-bundle.js")
ASSETS = {path.name: path for path in WEB.iterdir() if path.suffix in (".css", ".js")} | {
    name: Path(str(files("fastapi_offline") / "static" / name)) for name in SWAGGER_UI
}
# The pages may load from this server only, and may run no inline script.
PAGE_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
PAGE_HEADERS = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}


@router.get("/")
async def page() -> Response:
    return FileResponse(WEB / "index.html", headers=PAGE_HEADERS)


@router.get("/docs")
async def docs(request: Request) -> Response:
    if request.scope["raw_path"].endswith(b"/"):  # the page's relative addresses would be wrong below this path
        return RedirectResponse("../docs")
    return FileResponse(WEB / "docs.html", headers=PAGE_HEADERS)


@router.get("/static/{name}")
async def asset(name: str) -> Response:
    if name not in ASSETS:
        raise NotFound("there is no such file")
    return FileResponse(ASSETS[name], headers={"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"})
