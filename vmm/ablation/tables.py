"""A study's tables in Markdown, LaTeX and HTML; a table is one dict a line, column → text."""

import html
from collections.abc import Mapping, Sequence

Lines = Sequence[Mapping[str, str]]

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "→": r"$\to$",
    "×": r"$\times$", "<": "$<$", ">": "$>$",
}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; } td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; } .note { color: #666; } .small { font-size: 12px; }
"""


def markdown(table: Lines) -> str:
    """Returns the table in Markdown."""
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(line[column] for column in columns) + " |" for line in table])


def latex(table: Lines, caption: str) -> str:
    """Returns the table in LaTeX, for \\usepackage{booktabs}."""
    columns = list(table[0])
    rows = [" & ".join(_tex(line[column]) for column in columns) + r" \\" for line in table]
    head = " & ".join(_tex(column) for column in columns) + r" \\"
    top = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
    ]
    return "\n".join([*top, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _tex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def html_table(table: Lines, kind: str = "") -> str:
    """Returns the table in HTML."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table[0])
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line.values()) + "</tr>" for line in table
    )
    return f"<table class='{kind}'><tr>{head}</tr>{rows}</table>"


def page(title: str, parts: Sequence[str]) -> str:
    """Returns a self-contained HTML page; parts are HTML."""
    name = html.escape(title)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title><style>{_STYLE}</style>"
        f"<body><h1>{name}</h1>{''.join(parts)}</body></html>\n"
    )
