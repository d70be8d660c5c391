"""What mkdocs makes of our pages beside their Markdown: formulas as MathML, and tables written from the package itself."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

from windkern import recipes
from windkern.losses import LOSSES

PAPER = re.compile(r"\b(\d{4}\.\d{5})\b")
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "eps": "ε", "eta": "η", "rho": "ρ", "sigma": "σ", "tau": "τ"}
REPOSITORY = "https://github.com/windkern/windkern/blob/main/"


def linked(text: str) -> str:
    """Text with the arXiv numbers in it as links."""
    return PAPER.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def typeset(formula: str) -> str:
    """A formula of LOSSES, which is ASCII, with indices, powers and Greek letters."""
    for plain, sign in (("+-", "±"), (" - ", " − "), ("<=", "≤"), ("||", "‖"), ("*", "&#42;")):
        formula = formula.replace(plain, sign)
    formula = re.sub(r"\b[a-z]+\b", lambda word: GREEK.get(word[0], word[0]), formula)
    formula = re.sub(r"_\{([^}]*)\}", r"<sub>\1</sub>", formula)
    formula = re.sub(r"_(\(k\)|best|[A-Za-z]{1,2}\b)", r"<sub>\1</sub>", formula)
    return re.sub(r"\^(\w)", r"<sup>\1</sup>", formula)


def losses() -> str:
    """A table of LOSSES."""
    rows = ["| name | formula of a group | when | source |", "|---|---|---|---|"]
    for loss in LOSSES.values():
        link = f"[`{loss.name}`][windkern.losses.{loss.name}.{loss.name}]"
        rows.append(f"| {link} | {typeset(loss.formula)} | {loss.when} | {linked(loss.source)} |")
    return "\n".join(rows)


def papers() -> str:
    """A table of the papers whose losses are here, with the losses."""
    found: dict[str, list[str]] = {}
    for loss in LOSSES.values():
        for number in PAPER.findall(loss.source):
            found.setdefault(number, []).append(f"[`{loss.name}`][windkern.losses.{loss.name}.{loss.name}]")
    rows = [f"| [{number}](https://arxiv.org/abs/{number}) | {', '.join(names)} |" for number, names in sorted(found.items())]
    return "\n".join(["| arXiv | losses |", "|---|---|", *rows])


def recipe_table() -> str:
    rows = [f"| [`{name}`]({REPOSITORY}windkern/recipes/{name}.yaml) | {recipes.purpose(name)} |" for name in recipes.names()]
    return "\n".join(["| recipe | for |", "|---|---|", *rows])


TABLES = {"losses": losses, "papers": papers, "recipes": recipe_table}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Write the tables in place of `<!-- table: NAME -->`, and leave links of files above docs/ to the repository."""
    markdown = re.sub(r"<!-- table: (\w+) -->", lambda found: TABLES[found[1]](), markdown)
    return re.sub(r"\]\((?:\.\./)+((?:benchmarks|csrc|examples|tests|windkern)/[^)]*)\)", rf"]({REPOSITORY}\1)", markdown)


def spaced(formula: str) -> str:
    r"""LaTeX with the thin spaces around \log that LaTeX itself would set."""
    return re.sub(r"(?<=[\w)}] )\\log\b", r"\,\\log", formula).replace(r"\log ", r"\log\, ")


def on_page_content(content: str, **_: object) -> str:
    r"""Write \(...\) and \[...\] of arithmatex as MathML, which browsers draw themselves."""

    def formula(found: re.Match[str]) -> str:
        text = html.unescape(found[2]).strip()
        kind = "inline" if text.startswith("\\(") else "block"
        made = convert(spaced(text[2:-2].strip()), display=kind)
        if "\\" in made:  # a command that latex2mathml does not know
            raise ValueError(f"a formula cannot be written as MathML: {text}")
        # Reason: the glyph of a prime is raised already; as a superscript it would be tiny, and too high.
        return re.sub(r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>", r"<mrow>\1<mi>&#x02032;</mi></mrow>", made)

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.DOTALL)
