"""Reports of merges that no model was merged for: whatever a real one may hold, without torch."""

from __future__ import annotations

from typing import Any

from cadapt.merging.report import EndToEnd, FrontierPoint, Latency, MergeReport, ModelLatency, OnData, SiteMerge, Status

EVIL = '<script>alert("x")</script>&\x1b[31m[red]\u202e'
ORDER: tuple[Status, ...] = ("exact", "fitted", "fitted", "kept", "dropped", "simplified", "fitted", "refused")
REASONS = {
    "exact": "",
    "fitted": "a 3×3 kernel in the block's second conv stands in for it",
    "dropped": "what it adds is 0.0004 of what it is added to",
    "simplified": "its activation is relu, which no kernel computes; its scale is in its weights",
    "kept": "folding it would cost 1.4 points of top-1 more than is allowed",
    "refused": "the merged layer differs by 3.1e-04, more than 1e-12",
}


def site(at: int, status: Status, **changes: Any) -> SiteMerge:
    """A row with figures that fit its status."""
    gone = status in ("exact", "fitted", "dropped")
    measured = status != "exact"
    values: dict[str, Any] = {
        "site": f"layer{at // 4 + 1}.{at % 4}.conv2",
        "kind": "conv",
        "scheme": "conv-par",
        "form": "parallel",
        "status": status,
        "reason": REASONS[status],
        "error_fp64": None if status in ("kept", "dropped") else 1.3e-15 * (at + 1),
        "error_fp32": None if status in ("kept", "dropped") else 4.1e-7 * (at + 1),
        "relative_update": 0.02 + 0.013 * (at % 7) if status in ("exact", "fitted") else None,
        "effect": 0.31 / (at + 1),
        "parameters_before": 1152 * (at + 1),
        "parameters_after": 0 if gone else 1152 * (at + 1),
        "macs_before": 903_168 * (at + 1),
        "macs_after": 0 if gone else 903_168 * (at + 1),
        "linear_share": 0.5 + 0.06 * (at % 8) if measured else None,
        "relative_size": 0.4 / (at % 9 + 1) if measured else None,
        "r2": 0.99 - 0.17 * (at % 8) if measured else None,
        "hosts": (f"layer{at // 4 + 1}.{at % 4}.conv2",) if gone else (),
        "step": at if measured else None,
    }
    return SiteMerge(**{**values, **changes})


def frontier(count: int, chosen: int, *, labels: bool = True, latency: bool = True) -> tuple[FrontierPoint, ...]:
    """As many points as adapters can go, worse and worse, and one that was trained again."""
    points = [_point(at, chosen, labels, latency) for at in range(count + 1)]
    if count:
        points.append(_point(chosen, chosen, labels, latency, refined=True))
    return tuple(points)


def summary(rows: tuple[SiteMerge, ...]) -> str:
    counts = {status: sum(row.status == status for row in rows) for status in ("exact", "fitted", "dropped")}
    others = [f"{counts[status]} {status}" for status in ("fitted", "dropped") if counts[status]]
    return ", ".join([f"{counts['exact']} of {len(rows)} adapters fold into the base exactly", *others])


def report(count: int = 16, **changes: Any) -> MergeReport:
    """A fitted merge of all statuses, with all that can be measured."""
    rows = tuple(site(at, ORDER[at % len(ORDER)]) for at in range(count))
    folding = sum(row.step is not None for row in rows)
    values: dict[str, Any] = {
        "base": "resnet50.a1_in1k",
        "scheme": "conv-par",
        "dtype": "float32",
        "summary": summary(rows),
        "sites": rows,
        "parameters_before": 23_528_522 + sum(row.parameters_before for row in rows),
        "parameters_after": 23_528_522 + sum(row.parameters_after for row in rows),
        "macs_before": 4_089_184_256 + sum(row.macs_before for row in rows),
        "macs_after": 4_089_184_256 + sum(row.macs_after for row in rows),
        "end_to_end": END_TO_END,
        "verified": True,
        "timm_loadable": False,
        "timm_reason": "8 adapters stay in it",
        "frontier": frontier(folding, folding // 2),
        "tolerance": "top1=0.5%",
        "tolerance_met": True,
        "on_data": OnData(
            images=1797, top1_before=0.9712, top1_after=0.9682, agreement=0.9811, max_logit_error=1.21, logit_error=0.06
        ),
        "latency": LATENCY,
        "bytes_before": 1_204_224,
        "bytes_after": 812_032,
    }
    return MergeReport(**{**values, **changes})


def exact_report(count: int = 6, **changes: Any) -> MergeReport:
    """A merge without data: exact or not at all."""
    rows = tuple(site(at, "exact", step=None) for at in range(count))
    return report(
        count,
        **{
            "sites": rows,
            "frontier": (),
            "tolerance": "",
            "tolerance_met": None,
            "on_data": None,
            "latency": None,
            "bytes_before": None,
            "bytes_after": None,
            "timm_loadable": True,
            "timm_reason": "",
            **changes,
        },
    )


END_TO_END = EndToEnd(
    images=4,
    random_images=True,
    max_abs_error_fp64=2.1e-14,
    max_abs_error=3.3e-6,
    logit_scale=11.2,
    logit_effect=2.4,
    agreement=1.0,
)
LATENCY = Latency(
    models=(
        ModelLatency(name="base", milliseconds=21.4, ratio=1, ratio_low=1, ratio_high=1, nodes=122, bytes=94_000_000),
        ModelLatency(
            name="adapted", milliseconds=29.1, ratio=1.36, ratio_low=1.33, ratio_high=1.41, nodes=218, bytes=95_200_000
        ),
        ModelLatency(
            name="simplified",
            milliseconds=28.7,
            ratio=1.34,
            ratio_low=1.31,
            ratio_high=1.4,
            nodes=202,
            bytes=95_200_000,
        ),
        ModelLatency(
            name="merged", milliseconds=24.2, ratio=1.13, ratio_low=1.11, ratio_high=1.16, nodes=170, bytes=94_700_000
        ),
    ),
    batch_size=1,
    turns=40,
    threads=2,
    runtime="onnxruntime 1.23.0, CPU",
)


def _point(at: int, chosen: int, labels: bool, latency: bool, *, refined: bool = False) -> FrontierPoint:
    lost = 0.0004 * at**1.6 * (0.3 if refined else 1)
    return FrontierPoint(
        folded=at,
        site=f"layer{at // 4 + 1}.{at % 4}.conv2" if at else "",
        action=("dropped" if at == 1 else "fitted") if at else "",
        images=1797,
        top1=0.9712 - lost if labels else None,
        agreement=1 - 1.7 * lost,
        max_logit_error=60 * lost + 3e-6,
        logit_error=3 * lost + 1e-7,
        parameters=23_600_000 - 3000 * at,
        macs=4_150_000_000 - 4_000_000 * at,
        latency=1.36 - 0.02 * at if latency else None,
        refined=refined,
        chosen=at == chosen and refined,
    )
