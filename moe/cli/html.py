"""The page of `bench --html`: one file, with nothing to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

from moe.cli.machine import STAGES, Machine
from moe.cli.svg import Curve, bars, columns, plot
from moe.cli.text import Unit, decimal, flops_unit

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #33322f; background: #fcfcfb; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin-bottom: .3rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th, td { padding: .15rem .6rem; text-align: right }
th { white-space: nowrap } th { border-bottom: 1px solid #8a8984 } td:first-child, th:first-child { text-align: left } svg { max-width: 100%; height: auto }
.wrong { color: #b00020; font-weight: bold } .wide { overflow-x: auto }
"""
TIMED = (*STAGES, "experts", "whole")
BESIDE = ("untuned", "dense", "grouped_mm", "eager_experts", "eager")


def html_page(results: Sequence[dict[str, Any]], machine: Machine, date: str, unit: Unit) -> str:
    """What `BenchLine.report` made of each measurement, as a page: bars of stages, roofline, load, table, versions."""
    groups = [
        (model, routing, sorted(lines, key=lambda result: result["num_tokens"]))
        for (model, routing), lines in groupby(results, key=lambda result: (result["model"], result["routing"]))
    ]
    peaks = results[0]["peaks"]
    flops = flops_unit(peaks["matmul_flops"])
    parts = [
        f"<h1>MoE layers on {escape(machine.name)}</h1>",
        f"<p>{escape(date)}; {escape(machine.details)}. Peaks measured in the same process: "
        f"{flops.format(peaks['matmul_flops'])} {flops.name} {escape(peaks['matmul_dtype'])} matmul, "
        f"{decimal(1e-9 * peaks['copy_bytes_per_s'])} GB/s copy. Times in {unit.name}, medians.</p>",
        "<h2>Rate by intensity, stages 2 to 5</h2>",
        _roofline(groups, peaks, flops),
        "<p>At each point its tokens; dotted: the roof.</p>",
    ]
    for model, routing, lines in groups:
        parts += _layer(model, routing, lines, unit)
    parts += ["<h2>Versions</h2>", _versions(machine)]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>MoE layers on {escape(machine.name)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _layer(model: str, routing: str, lines: Sequence[dict[str, Any]], unit: Unit) -> list[str]:
    rows = []
    for line in lines:
        stages = line["stages"]
        whole = unit.format(stages["whole"]["median_us"])
        times = [stages[stage]["median_us"] / unit.size for stage in STAGES]
        rows.append((f"{line['num_tokens']:,} tokens", times, f"whole {whole}"))
    load = lines[-1]["load"]
    return [
        f"<h2>{escape(model)}, {escape(routing)} routing</h2>",
        "<h3>Time of each stage by itself</h3>",
        bars(rows, STAGES, f"time of each stage of {model} by tokens"),
        f"<h3>Rows of each expert at {lines[-1]['num_tokens']:,} tokens</h3>",
        columns(load["rows_of_expert"], f"rows of each expert of {model}"),
        f"<p>imbalance {load['imbalance']:.2f} (max / mean); {100 * load['padding_share']:.0f}% of the rows are padding</p>",
        f'<div class="wide">{_table(lines, unit)}</div>',
    ]


def _table(lines: Sequence[dict[str, Any]], unit: Unit) -> str:
    beside = [name for name in BESIDE if any(name in line["beside_us"] for line in lines)]
    header = ("tokens", *TIMED, "roof", "of roof", *beside, "error")
    rows = []
    for line in lines:
        whole = line["stages"]["whole"]
        cells = [f"{line['num_tokens']:,}", *(unit.format(line["stages"][name]["median_us"]) for name in TIMED)]
        cells += [unit.format(whole["roof_us"]), f"{100 * whole['share_of_roof']:.0f}%"]
        cells += [unit.format(line["beside_us"][name]) if name in line["beside_us"] else "&ndash;" for name in beside]
        error = f"{line['accuracy']['relative_frobenius']:.1e}"
        cells += [error if line["accuracy"]["is_good"] else f'<span class="wrong">{error}</span>']
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _roofline(groups: Sequence[tuple[str, str, Sequence[dict[str, Any]]]], peaks: dict[str, Any], flops: Unit) -> str:
    curves = []
    for model, routing, lines in groups:
        experts = [line["stages"]["experts"] for line in lines if line["stages"]["experts"]["flops"]]
        points = [
            (stage["flops"] / stage["num_bytes"], 1e6 * stage["flops"] / stage["median_us"] / flops.size)
            for stage in experts
        ]
        name = model if routing == "uniform" else f"{model}, {routing}"
        curves.append(Curve(name, points, [f"{line['num_tokens']:,}" for line in lines]))
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return "<p>no operations to show</p>"
    xs = [x for curve in curves for x, _ in curve.points]
    ridge = peaks["matmul_flops"] / peaks["copy_bytes_per_s"]
    ends = sorted({min(xs), ridge, max(*xs, 2 * ridge)})
    roof = [(x, min(peaks["matmul_flops"], x * peaks["copy_bytes_per_s"]) / flops.size) for x in ends]
    curves.append(Curve("roof", roof, is_dotted=True, color="#8a8984"))
    return plot(curves, "operations a byte moved", flops.name, "roofline of stages 2 to 5")


def _versions(machine: Machine) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in machine.versions.items()
    )
    return f"<table>{rows}</table>"
