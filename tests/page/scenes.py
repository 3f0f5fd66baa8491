"""Stands in for the server's data: the real page and schema, made-up requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.responses import FileResponse, Response

import vllm_avl.front_end
from benchmarks.testing import models
from vllm_avl.config import AVLConfig
from vllm_avl.demo.server import free_port, picture_url
from vllm_avl.front_end import schema
from vllm_avl.front_end.geometry import VisionModel, grids
from vllm_avl.metrics.pool import Sample
from vllm_avl.reports import CoreSelection, Held

STATIC = Path(vllm_avl.front_end.__file__).with_name("static")
POLICY = "default-src 'self'; img-src 'self' data:"

BLOCK = 32
START, NUM_VISION, PROMPT = 16, 576, 620
RANKED = 608 - START
STORED, CORE = 320, 192
STEPS, INTERVAL = 90, 3
WORDS = ["The", "picture", "shows", "coloured", "shapes", "on", "a", "gradient", "."]


def scores(layer: int, step: int, size: int = 24, head: int = 0) -> np.ndarray:
    """Attention that drifts over the picture from step to step."""
    rows, columns = np.mgrid[0:size, 0:size] / size
    angle = 0.9 * layer + step / 40 + 2 * head
    x, y = 0.5 + 0.27 * np.cos(angle), 0.5 + 0.27 * np.sin(angle)
    near = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 0.06)
    noise = np.random.default_rng(layer * 1000 + head).random((size, size))
    return (near + 0.25 * noise).flatten()


def best(values: np.ndarray, among: np.ndarray, count: int) -> list[int]:
    order = among[np.argsort(-values[among], kind="stable")]
    return sorted((order[:count] + START).tolist())


def layer_of(number: int, heads: int = 1, rank: int = 0) -> schema.Layer:
    """One layer, its core chosen anew every `INTERVAL` steps."""
    everything = np.arange(NUM_VISION)
    stored = [best(scores(number, 0, head=h), everything, STORED) for h in range(heads)]
    history = []
    for step in range(0, STEPS + 1, INTERVAL):
        core = [
            best(scores(number, step, head=h), np.array(kept) - START, CORE)
            for h, kept in enumerate(stored)
        ]
        history.append(CoreSelection(num_tokens=PROMPT + step, core=core))
    core = history[-1].core
    vision = set(range(START, START + NUM_VISION))
    text = sorted(set(range(PROMPT + STEPS)) - vision)
    return schema.Layer(
        layer=number,
        rank=rank,
        core=core,
        secondary=[sorted(set(k) - set(c)) for k, c in zip(stored, core, strict=True)],
        evicted=[sorted(vision - set(kept)) for kept in stored],
        text=[text] * heads,
        history=history,
    )


def timeline() -> list[Held]:
    freed = 8
    found = [Held(num_tokens=PROMPT, held=20, stock=20)]
    for length in [PROMPT, *range(641, PROMPT + STEPS, BLOCK), PROMPT + STEPS]:
        stock = -(-length // BLOCK)
        found.append(Held(num_tokens=length, held=stock - freed, stock=stock))
    return found


def picture(**changes: Any) -> schema.Picture:
    image = models.random_image(5, 448, 336)
    ranges = [(START, START + NUM_VISION)]
    values = {
        "ranges": ranges,
        "width": image.width,
        "height": image.height,
        "url": picture_url(image),
        "grids": grids(VisionModel("llava"), image.width, image.height, ranges),
    }
    return schema.Picture(**(values | changes))


def detail(name: str = "chatcmpl-91c0f6", /, **changes: Any) -> schema.Detail:
    """A finished request of a small LLaVA, unless told otherwise."""
    tokens = [f"{WORDS[i % len(WORDS)]} " for i in range(STEPS + 1)]
    settings = AVLConfig(core_ratio=0.3, introspection=16)
    values = {
        "id": name,
        "name": name,
        "running": False,
        "policy": "avl",
        "num_prompt_tokens": PROMPT,
        "num_tokens": PROMPT + STEPS,
        "num_vision_tokens": NUM_VISION,
        "num_refreshes": STEPS // INTERVAL,
        "num_blocks_held": 15,
        "num_blocks_freed": 8,
        "settings": settings.model_dump(),
        "ranked_ranges": [(START, START + NUM_VISION)],
        "timeline": timeline(),
        "pictures": [picture()],
        "layers": [layer_of(number) for number in range(4)],
        "answer": "".join(tokens),
        "answer_tokens": tokens,
        "hidden": None,
    }
    return schema.Detail(**(values | changes))


METRICS = {
    "vllm_avl_requests_adapted_total": 41,
    "vllm_avl_requests_left_alone_total{reason=no_vision}": 12,
    "vllm_avl_requests_left_alone_total{reason=off}": 3,
    "vllm_avl_vision_tokens_stored_total": 13120,
    "vllm_avl_vision_tokens_evicted_total": 10496,
    "vllm_avl_text_tokens_evicted_total": 0,
    "vllm_avl_blocks_freed_early_total": 328,
    "vllm_avl_refreshes_total": 1208,
    "vllm_avl_core_rows_selected_total": 903000,
    "vllm_avl_core_rows_entered_total": 144480,
    "vllm_avl_requests_running": 3,
    "vllm_avl_kv_blocks_held": 39,
    "vllm_avl_kv_blocks_stock": 63,
    "vllm_avl_kv_bytes_held": 39 * 4 * 65536,
    "vllm_avl_kv_bytes_stock": 63 * 4 * 65536,
    "vllm_avl_engaged": 1,
}


def pool() -> list[Sample]:
    now = time.time()
    wave = 4 + 3 * np.sin(np.arange(180) / 19) + np.arange(180) / 60
    return [
        Sample(
            time=now - 180 + second,
            engine=0,
            held=int(13 * requests),
            stock=int(21 * requests),
        )
        for second, requests in enumerate(np.floor(wave).tolist())
    ]


@dataclass
class Scene:
    """What the stand-in answers; tests change it while it runs."""

    details: list[schema.Detail] = field(default_factory=lambda: [detail()])
    remembers: int = 16
    metrics: dict[str, float] = field(default_factory=lambda: dict(METRICS))
    pool: list[Sample] = field(default_factory=pool)
    key: str | None = None
    fault: tuple[int, str] | None = None

    def config(self) -> schema.Config:
        settings = AVLConfig(core_ratio=0.3, introspection=self.remembers)
        return schema.Config(
            version="0.1.0",
            vllm_version="0.32.0",
            model="demo-llava",
            settings=settings.model_dump(),
            block_size=BLOCK,
            num_blocks=120,
            shows_content=True,
            remembers=self.remembers,
        )

    def stats(self) -> schema.Stats:
        return schema.Stats(
            metrics=self.metrics, num_blocks=120, block_size=BLOCK, pool=self.pool
        )

    def requests(self) -> schema.Requests:
        fields = schema.Summary.model_fields
        summaries = [
            schema.Summary(**{name: getattr(one, name) for name in fields})
            for one in self.details
        ]
        return schema.Requests(requests=summaries, remembers=self.remembers)


def application(scene: Scene) -> FastAPI:
    """The routes that the page uses, answered from `scene`."""
    app = FastAPI()
    app.mount("/avl/static", StaticFiles(directory=STATIC))
    add_guard(app, scene)
    add_data(app, scene)

    @app.get("/avl/")
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    return app


def add_guard(app: FastAPI, scene: Scene) -> None:
    """Refuse data where the scene does, and forbid what the page must not need."""

    @app.middleware("http")
    async def guard(request: Request, go_on: Any) -> Response:
        path = request.url.path
        is_data = not (path == "/avl/" or path.startswith("/avl/static/"))
        header = request.headers.get("authorization")
        if is_data and scene.key and header != f"Bearer {scene.key}":
            return JSONResponse({"detail": "give the API key"}, 401)
        if is_data and scene.fault:
            return JSONResponse({"detail": scene.fault[1]}, scene.fault[0])
        response = await go_on(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response


def add_data(app: FastAPI, scene: Scene) -> None:
    """Add the routes that answer with data."""

    @app.get("/avl/config")
    def config() -> schema.Config:
        return scene.config()

    @app.get("/avl/stats")
    def stats() -> schema.Stats:
        return scene.stats()

    @app.get("/avl/requests")
    def requests() -> schema.Requests:
        return scene.requests()

    @app.get("/avl/requests/{name:path}", response_model=schema.Detail)
    def one(name: str) -> Any:
        found = [one for one in scene.details if one.id == name]
        found = found or [one for one in scene.details if one.name == name]
        if len(found) > 1:
            return JSONResponse({"detail": f"several are called {name}"}, 409)
        return found[0] if found else JSONResponse({"detail": "not known"}, 404)


@dataclass
class StandIn:
    """A running server of a scene, which can die and come back."""

    scene: Scene
    port: int = field(default_factory=free_port)
    server: uvicorn.Server | None = None
    thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/avl/"

    def start(self) -> None:
        app = application(self.scene)
        self.server = uvicorn.Server(
            uvicorn.Config(
                app, port=self.port, log_level="warning", ws="none", lifespan="off"
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        if self.server and self.thread:
            self.server.should_exit = True
            self.server.force_exit = True
            self.thread.join(20)


@contextmanager
def standing_in(scene: Scene) -> Iterator[StandIn]:
    stand_in = StandIn(scene)
    stand_in.start()
    try:
        yield stand_in
    finally:
        stand_in.stop()
