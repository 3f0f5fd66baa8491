"""The routes below /avl: what they take, and who may call them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from vllm_avl.front_end import schema
from vllm_avl.front_end.detail import describe, read_reports, read_summaries
from vllm_avl.front_end.records import RECORDS
from vllm_avl.metrics.pool import POOL

STATIC = Path(__file__).parent / "static"
MAX_LISTED = 256
POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    # A browser must not mix files of two versions.
    "Cache-Control": "no-cache",
}
FAULTS: dict[int | str, dict[str, Any]] = {
    401: {"model": schema.Fault, "description": "the server has an API key"},
    404: {"model": schema.Fault, "description": "there is no such thing"},
    409: {"model": schema.Fault, "description": "several requests carry this id"},
    422: {"model": schema.Fault, "description": "a value that is not allowed"},
    503: {"model": schema.Fault, "description": "the engine does not answer"},
}


class ProblemError(Exception):
    """Ends a request with a status and a reason."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _Route(APIRoute):
    """Answers what goes wrong as `schema.Fault`, whatever the application does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except ProblemError as problem:
                return _fault(problem.status, str(problem))
            except RequestValidationError as error:
                return _fault(422, "; ".join(map(_sentence, error.errors())))

        return handled


class _Files(StaticFiles):
    """The page's files, with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def _fault(status: int, detail: str) -> JSONResponse:
    return JSONResponse(schema.Fault(detail=detail).model_dump(), status)


def _sentence(fault: Any) -> str:
    return f"{fault['loc'][-1]} = {fault['input']!r}: {fault['msg'].lower()}"


def attach(app: FastAPI, may_read: Callable[[Request], bool]) -> None:
    """Add the page, which holds no data, and the routes that give it some.

    Args:
        app: has the engine as `state.avl_engine` once it is up.
        may_read: whether a request carries the server's API key.
    """
    page = APIRouter(prefix="/avl", include_in_schema=False)

    files = _Files(directory=STATIC)

    # Addresses are relative and nothing is mounted: a proxy may have put a prefix in
    # front, and may have told the server (--root-path) or not.
    @page.get("")
    async def redirect() -> RedirectResponse:
        return RedirectResponse("avl/")

    @page.get("/")
    async def show() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    @page.api_route("/static/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        return await files.get_response(name, request.scope)

    app.include_router(page)
    app.include_router(_data(may_read))


def _data(may_read: Callable[[Request], bool]) -> APIRouter:
    router = APIRouter(
        prefix="/avl", tags=["vllm-avl"], route_class=_Route, responses=FAULTS
    )

    def engine_of(request: Request) -> Any:
        if not may_read(request):
            raise ProblemError(401, "send the server's key: Authorization: Bearer KEY")
        engine = request.app.state.avl_engine
        engine.check_back_end()
        return engine

    @router.get("/config", summary="What the server was started with")
    async def config(request: Request) -> schema.Config:
        engine = engine_of(request)
        settings = engine.config
        return schema.Config(
            version=version("vllm-avl"),
            vllm_version=engine.vllm_version,
            model=engine.model,
            settings=settings.model_dump(),
            block_size=engine.block_size,
            num_blocks=engine.num_blocks,
            shows_content=settings.show_content,
            remembers=settings.introspection,
        )

    @router.get("/stats", summary="Totals, and the pool's recent past")
    async def stats(request: Request) -> schema.Stats:
        engine = engine_of(request)
        return schema.Stats(
            metrics=engine.metrics(),
            num_blocks=engine.num_blocks,
            block_size=engine.block_size,
            pool=POOL.timeline(),
        )

    @router.get("/requests", summary="Adaptive requests, running or remembered")
    async def requests(
        request: Request, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 64
    ) -> schema.Requests:
        engine = engine_of(request)
        remembers = engine.config.introspection
        found = [
            summary
            for ranks in await engine.ask("avl_summaries")
            for summary in read_summaries(ranks[0], engine.external_id)
        ]
        return schema.Requests(requests=found[:limit], remembers=remembers)

    @router.get(
        "/requests/{request_id:path}", summary="One adaptive request, layer by layer"
    )
    async def one_request(request: Request, request_id: str) -> schema.Detail:
        engine = engine_of(request)
        own = await _own_id(engine, request_id)
        for ranks in await engine.ask("avl_report", own):
            reports = [one for one in read_reports(ranks) if one.request_id == own]
            if reports:
                record = RECORDS.find(own)
                content = record and record.content
                tokens = content.answer_token_ids if content else ()
                # Pictures are read again, which takes its time.
                return await run_in_threadpool(
                    describe,
                    engine.external_id(own),
                    reports,
                    record,
                    engine.hf_config,
                    engine.decode(tokens),
                    shows_content=engine.config.show_content,
                )
        raise _unknown(request_id, engine)

    return router


async def _own_id(engine: Any, request_id: str) -> str:
    """Return the engine's id of the one request that `request_id` means.

    Args:
        engine: knows the requests.
        request_id: the engine's, or the one that its answer carries.

    Raises:
        ProblemError: there is none, or there are several.
    """
    known = [name for ranks in await engine.ask("avl_requests") for name in ranks[0]]
    meant = [name for name in known if name == request_id] or [
        name for name in known if engine.external_id(name) == request_id
    ]
    if not meant:
        raise _unknown(request_id, engine)
    if len(meant) > 1:
        raise ProblemError(
            409,
            f"{len(meant)} requests carry the id {request_id!r}, which their clients "
            f"chose: ask for one of {', '.join(meant)}",
        )
    return meant[0]


def _unknown(request_id: str, engine: Any) -> ProblemError:
    return ProblemError(
        404,
        f"request {request_id!r} is not adaptive, not here, or no longer "
        f"remembered; {engine.config.introspection} finished requests are",
    )
