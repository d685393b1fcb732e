"""One log format for all processes: a line for people on a terminal, JSON otherwise."""

from __future__ import annotations

import logging
import sys

import structlog

from pagehold.runtime import stderr


def configure(component: str, level: str = "info") -> None:
    """Sets up structlog for this process; every line names the component. Logs go to stderr, and never hold it up."""
    stderr.install()
    terminal = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(component=component)
