"""Tables as aligned text and as HTML; the first row is the heading."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, left: Collection[int] = (0,)) -> list[str]:
    """One line per row; the columns `left` are aligned to the left, all others to the right.

    Example:
        >>> print(*aligned([("name", "size"), ("fc", "12"), ("output", "4,096")]), sep="\\n")
        name     size
        fc         12
        output  4,096
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if at in left else cell.rjust(width)
                      for at, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]


def html(rows: Rows, caption: Sequence[str] = ()) -> str:
    """The rows as an HTML table, with lines of text above it."""
    lines = "".join(f"<div>{escape(line)}</div>" for line in caption)
    body = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for row, tag in zip(rows, ["th", *["td"] * len(rows)], strict=False)]
    return f"{lines}<table>{''.join(f'<tr>{cells}</tr>' for cells in body)}</table>"
