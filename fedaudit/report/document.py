"""The frame of every page: one HTML document with its style, its script and no way to the network."""

from collections.abc import Callable

from plotly.offline import offline

from fedaudit.report import markup, template

plotly_script: Callable[[], str] = offline.get_plotlyjs


def document(title: str, subtitle: str, sections: dict[str, tuple[str, str]], notice: str = "") -> str:
    """A self-contained page.

    Args:
        title: plain text.
        subtitle: plain text below it.
        sections: heading and HTML of each section, by anchor; those without HTML are left out.
        notice: HTML shown above them.
    """
    drawn = {anchor: (heading, body) for anchor, (heading, body) in sections.items() if body}
    links = "".join(
        f'<a href="#{anchor}">{markup.text(heading)}</a>' for anchor, (heading, _) in drawn.items()
    )
    body = "\n".join(body for _, body in drawn.values())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{template.POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{markup.text(title)}</title>
<style>{template.STYLE}</style>
</head>
<body>
<main>
<header><h1>{markup.text(title)}</h1>
{markup.paragraph(subtitle, "quiet")}
<nav>{links}</nav>
</header>
<noscript><p class="notice">The figures need JavaScript; tables and findings do not.</p></noscript>
{notice}
{body}
<footer>{markup.paragraph("Written by fedaudit. This page loads nothing from a network.", "quiet")}</footer>
</main>
<script>{plotly_script()}</script>
<script>{template.SCRIPT}</script>
</body>
</html>
"""
