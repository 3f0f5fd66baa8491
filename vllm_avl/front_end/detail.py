"""Puts together what is known of one request: the workers' part and the front end's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from vllm_avl.front_end import schema
from vllm_avl.front_end.geometry import VisionModel, grids
from vllm_avl.front_end.records import Part, Record
from vllm_avl.reports import RequestReport, RequestSummary

NOT_KEPT = (
    "pictures and answers are not kept: start the server with "
    '{"avl": {"show_content": true}} where everybody who may call it may see them'
)
NOT_HERE = "another process took this request, or it is too long ago"

_reports = TypeAdapter(list[RequestReport | None])
_summaries = TypeAdapter(list[RequestSummary])


def read_reports(answers: Sequence[Any]) -> list[RequestReport]:
    """Read what the ranks of one engine answered; empty if they do not know it."""
    return [report for report in _reports.validate_python(answers) if report]


def read_summaries(
    answers: Sequence[Any], external_id: Callable[[str], str]
) -> list[schema.Summary]:
    """Read what one rank answered."""
    return [
        _summary(external_id(summary.request_id), summary)
        for summary in _summaries.validate_python(answers)
    ]


def _summary(name: str, summary: RequestSummary) -> schema.Summary:
    counted = {field: getattr(summary, field) for field in _COUNTED}
    return schema.Summary(id=summary.request_id, name=name, **counted)


_COUNTED = [
    field.name for field in fields(RequestSummary) if field.name != "request_id"
]


def describe(
    name: str,
    reports: Sequence[RequestReport],
    record: Record | None,
    hf_config: Any,
    answer_tokens: list[str],
    *,
    shows_content: bool,
) -> schema.Detail:
    """Return all there is to say of a request.

    Args:
        name: the id that its answer carries.
        reports: one a rank.
        record: the front end's; None where it has none.
        hf_config: of the model.
        answer_tokens: the answer, token by token.
        shows_content: whether pictures and answers are kept at all.
    """
    report = reports[0]
    content = record.content if record and shows_content else None
    hidden = None if content else (NOT_HERE if shows_content else NOT_KEPT)
    return schema.Detail(
        **_summary(name, report).model_dump(),
        settings=report.settings,
        ranked_ranges=report.ranked_ranges,
        timeline=report.timeline,
        pictures=_pictures(report, record, VisionModel.of(hf_config)),
        layers=[
            schema.Layer(**vars(layer), rank=rank)
            for rank, of_rank in enumerate(reports)
            for layer in of_rank.layers
        ],
        answer=content.answer if content else None,
        answer_tokens=answer_tokens if content else None,
        hidden=hidden,
    )


def _pictures(
    report: RequestReport, record: Record | None, model: VisionModel
) -> list[schema.Picture]:
    """Lay out each picture; all vision as one where nobody knows them apart."""
    if record is None or not record.parts:
        return [_picture(Part(report.vision_ranges), VisionModel(""))]
    return [_picture(part, model) for part in record.parts]


def _picture(part: Part, model: VisionModel) -> schema.Picture:
    # Once: it may be dropped while it is looked at.
    picture = part.picture
    laid_out = []
    if picture is not None:
        laid_out = grids(model, *picture.size, part.ranges)
    elif model.model_type == "llava":
        # Its patches are a square whatever the picture.
        laid_out = grids(model, 1, 1, part.ranges)
    width, height = picture.size if picture else (None, None)
    return schema.Picture(
        ranges=list(part.ranges),
        width=width,
        height=height,
        url=picture.url if picture else None,
        grids=laid_out,
    )
