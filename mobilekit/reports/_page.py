"""Puts the report's parts in the order in which a person asks for them."""

from __future__ import annotations

from mobilekit.reports import (
    _conditions,
    _devices,
    _files,
    _frontier,
    _operators,
    _plan,
    _precisions,
    _rounds,
    _summary,
)
from mobilekit.reports import _words as words
from mobilekit.reports._blocks import Page
from mobilekit.types import Report


def page(report: Report) -> Page:
    """The report as titled sections of text, tables and pictures, for any form of it."""
    facts = (
        ("Workload", report.workload),
        ("Profile", report.profile),
        ("Device", report.device or "none, nothing measured"),
        ("Made", words.moment(report.created_at)),
    )
    sections = (
        _summary.findings(report),
        _summary.before_after(report),
        *([_devices.devices(report)] if report.devices else []),
        *([_frontier.frontier(report)] if report.frontier else []),
        _operators.operators(report),
        _rounds.rounds(report),
        _precisions.precisions(report),
        _plan.plan(report),
        _plan.rejected(report),
        _files.models(report),
        _conditions.troubles(report),
        _conditions.conditions(report),
        _conditions.samples(report),
        _conditions.origin(report),
    )
    footer = f"mobilekit {report.mobilekit_version}, seed {report.seed}. Every figure is in report.json."
    return Page(f"mobilekit: {report.workload}", facts, _summary.verdict(report), _troubles(report), sections, footer)


def _troubles(report: Report) -> str:
    """How much went wrong, for the top of the page; empty where nothing did."""
    counts = [
        words.plural(len(items), noun)
        for items, noun in ((report.failures, "failure"), ((*report.measured_warnings, *report.warnings), "warning"))
        if items
    ]
    return words.listed(counts)
