"""Reads the Markdown tables that a benchmark has printed."""

Row = dict[str, str]


def printed_tables(text: str) -> list[list[Row]]:
    """Return all tables of `text`, each a list of rows by column."""
    tables: list[list[list[str]]] = []
    is_inside = False
    for line in text.splitlines():
        if line.startswith("|"):
            if not is_inside:
                tables.append([])
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        is_inside = line.startswith("|")
    return [
        [dict(zip(columns, row, strict=True)) for row in rows]
        for columns, _, *rows in tables
    ]
