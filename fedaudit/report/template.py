"""The page's frame: style sheet, script, and the texts that do not depend on data.

They are Python strings because a Flower app bundle carries Python and TOML files only.
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
"""Forbids the browser every network access, whatever the page holds."""

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --quiet: #52606d; --rule: #d5dbe1; --shade: #f5f7f9;
  --mark: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 28px 20px 60px; }
header { border-bottom: 3px solid var(--mark); padding-bottom: 14px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 40px 0 10px; padding-bottom: 4px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 16px; margin: 26px 0 8px; }
h3.variation { font-size: 17px; margin: 30px 0 10px; padding: 4px 10px; background: var(--shade);
  border-left: 4px solid var(--mark); overflow-wrap: anywhere; }
p { margin: 6px 0 10px; max-width: 95ch; }
.quiet { color: var(--quiet); font-size: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 12px 0 0; font-size: 14px; }
nav a { color: var(--mark); text-decoration: none; }
nav a:hover { text-decoration: underline; }
ul { margin: 8px 0; padding-left: 22px; max-width: 110ch; }
li { margin: 5px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(255px, 1fr)); gap: 12px 24px;
  margin: 10px 0; }
.facts .wide { grid-column: span 2; }
.facts dt { color: var(--quiet); font-size: 13px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.notice { border-left: 4px solid #D55E00; background: #fdf4ee; padding: 8px 16px; margin: 16px 0; }
.notice ul { margin: 0; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 10px; border-bottom: 1px solid var(--rule);
  overflow-wrap: break-word; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; font-weight: 600; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr:nth-child(even) { background: var(--shade); }
table.comparison td:first-child, table.reading td:first-child { font-weight: 600; }
td.short { white-space: nowrap; }
td.long { overflow-wrap: anywhere; }
.key { display: flex; flex-wrap: wrap; gap: 2px 22px; list-style: none; padding: 0; font-size: 14px; }
.key li { margin: 2px 0; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 18px 26px; align-items: start; }
.plots > .plot { min-width: 0; }
.plot { width: 100%; margin: 6px 0; break-inside: avoid; }
.attacks { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 20px; }
.attack { border: 1px solid var(--rule); border-radius: 4px; padding: 10px 14px; break-inside: avoid; }
.attack h4 { margin: 0 0 2px; font-size: 14px; overflow-wrap: anywhere; }
.attack p { font-size: 13px; margin: 2px 0 8px; }
.pairs { display: flex; flex-wrap: wrap; gap: 12px; }
.pair { margin: 0; width: 96px; font-size: 12px; line-height: 1.35; }
.pair img { display: block; width: 96px; height: auto; image-rendering: pixelated; margin-bottom: 4px;
  border: 1px solid var(--rule); }
.pair figcaption { font-variant-numeric: tabular-nums; white-space: nowrap; }
details > summary { cursor: pointer; color: var(--mark); margin: 8px 0; }
footer { margin-top: 44px; border-top: 1px solid var(--rule); padding-top: 10px; }
@media screen and (max-width: 900px) { .plots { grid-template-columns: 1fr; } }
@page { size: A4 landscape; margin: 12mm; }
@media print {
  body { zoom: 0.88; }
  main { padding: 0; max-width: none; width: 1140px; }
  nav, .modebar-container, .modebar { display: none !important; }
  .scroll { overflow: visible; }
  .plot .svg-container, .plot svg.main-svg { width: 100% !important; }
  h2, h3 { break-after: avoid; }
  tr, .attack { break-inside: avoid; }
  thead { display: table-header-group; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
function fit(box) {  // a drawing with a viewBox is scaled, not cut, where paper is narrower than the screen
  box.querySelectorAll("svg.main-svg").forEach(function (svg) {
    svg.setAttribute("viewBox", "0 0 " + parseFloat(svg.style.width || svg.getAttribute("width")) + " "
      + parseFloat(svg.style.height || svg.getAttribute("height")));
    svg.setAttribute("preserveAspectRatio", "xMinYMin meet");
  });
}
document.querySelectorAll(".plot").forEach(function (box) {
  var figure = JSON.parse(box.firstElementChild.textContent);
  box.textContent = "";
  Plotly.newPlot(box, figure.data, figure.layout, {
    responsive: true, displayModeBar: false, showSendToCloud: false, showTips: false
  });
  box.on("plotly_afterplot", function () { fit(box); });
  fit(box);
});
window.addEventListener("beforeprint", function () {
  document.querySelectorAll("details").forEach(function (box) { box.open = true; });
});
"""

THREAT_MODEL = (
    (
        "server",
        "Sees every client's update, the global weights, the agreed training settings and reference data "
        "of its own. It follows the protocol and is curious. Its numbers need no private data and can be "
        "had in a real federation.",
    ),
    (
        "client",
        "Sees its own examples and measures itself. It sends scalars only, by its own choice. Its "
        "numbers can be had in a real federation but are not verified.",
    ),
    (
        "oracle",
        "Exists in simulation only: the auditor may look at the clients' data to score attacks and to "
        "calibrate the other two. Its numbers cannot be had in a real federation.",
    ),
)

KINDS = (
    ("exact", "computed without error from what the observer sees"),
    ("estimate", "has statistical error in either direction"),
    ("lower", "the true value is at least this, under the stated assumptions"),
    ("upper", "the true value is at most this, under the stated assumptions"),
)

INTERVALS = (
    "Intervals are Student-t 95 % intervals over seeds: clients and rounds of one run share a model, so "
    "they are averaged within each seed first. They cover the choice of seed (data split, initial "
    "weights, noise), not other data, models or settings. With two seeds the t factor is 12.7 and "
    "intervals are wide. Several comparisons are made at once: at 95 % about one in twenty intervals "
    "misses the true difference by chance."
)

BOOTSTRAP = (
    "Bootstrap: 95 % percentile interval that draws seeds, and clients within them, for both defenses at "
    "once. With three seeds it covers 97 % if clients differ much more than seeds do and under 80 % if "
    "half the variance lies between seeds, so the readings go by the t interval. Where there is one number "
    "per seed, as for accuracy, it needs six seeds: it cannot leave the range of the values, and the range "
    "of three covers 75 % at most."
)

FRONT = (
    "The grey line is the best accuracy at no more leakage: a defense on it is not beaten on both axes by "
    "another one. It is drawn through means, and within the intervals a place on it can be chance: beside "
    "each name is in how many seeds it is not beaten. Rings and dashed lines do the same among defenses with "
    "one unit, adversary and δ whose ε differ by at most 5 %. ε is the worst client's, at the δ, unit and "
    "accountant given in the comparison table."
)

EPSILON = (
    "Formal guarantee of differential privacy: for any two data sets that differ in one unit (an example "
    "or a client) no output is more than e^ε times likelier, up to δ. It is the largest over clients, "
    "because their data are disjoint, composed over the rounds each took part in.",
    "Not a measurement: it holds for every adversary if the mechanism runs as stated, and is usually far "
    "above what a given attack achieves. An ε without its δ, unit and accountant says nothing. One of "
    "central noise holds against an outsider, who sees the released models only, and not against the server.",
)
