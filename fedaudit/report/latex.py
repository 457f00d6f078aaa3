"""A table as LaTeX that compiles without packages: a plain tabular of ASCII, everything special escaped."""

from collections.abc import Iterable, Sequence

import pandas as pd

_WRITTEN = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "[": "{[}",  # at the start of a row it would be an option of the line break before
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "…": r"\dots{}",
    "·": r"$\cdot$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "½": r"$\frac{1}{2}$",
    "×": r"$\times$",
    "ε": r"$\varepsilon$",
    "δ": r"$\delta$",
    "λ": r"$\lambda$",
    "ρ": r"$\rho$",
    "σ": r"$\sigma$",
}


def to_latex(frame: pd.DataFrame, right: Sequence[str] = ()) -> str:
    r"""A frame of text or numbers as a ``tabular``; columns in `right` are set flush right.

    It needs no package. A character outside ASCII that has no command here becomes ``(U+...)``: pdfLaTeX
    would stop at it.

    >>> print(to_latex(pd.DataFrame({"a_b": ["1 ± 2"]}), right=["a_b"]))
    \begin{tabular}{r}
    \hline
    a\_b \\ \hline
    1 $\pm$ 2 \\
    \hline
    \end{tabular}
    """
    columns = "".join("r" if str(name) in right else "l" for name in frame.columns)
    body = [_line(row) for row in frame.itertuples(index=False, name=None)]
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", rf"{_line(frame.columns)} \hline", *body]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"])


def _line(cells: Iterable[object]) -> str:
    return " & ".join(escaped(str(cell)) for cell in cells) + r" \\"


def escaped(text: str) -> str:
    r"""Text that LaTeX sets as it is; line breaks become spaces.

    >>> print(escaped("50 % of a_b"))
    50 \% of a\_b
    """
    return "".join(_character(each) for each in " ".join(text.split()))


def _character(character: str) -> str:
    if character in _WRITTEN:
        return _WRITTEN[character]
    return character if character.isascii() else f"(U+{ord(character):04X})"
