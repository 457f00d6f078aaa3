"""What a reader must know about each quantity: its label, its place, its direction and its limits.

Nothing depends on this list but wording and order: a quantity that is not in it is shown all the same,
described by the registry's one line if it is a registered measure.
"""

from dataclasses import dataclass, replace
from typing import Literal

from fedaudit.registry import MEASURES

Role = Literal["utility", "leakage", "attack", "update", "cost"]
Pooling = Literal["last", "mean", "sum"]

LAYER = ".layer"
"""Ends the name of the quantity that a measure gives for one layer."""

BOUND = " bound"
"""Ends the name of the quantity made of a record's extra value "bound-nats"."""


@dataclass(frozen=True)
class Quantity:
    """How one quantity is worded, ordered and summarised.

    Attributes:
        name: name in the records.
        label: name for people, without unit.
        role: utility, leakage, attack (a score of a reconstruction), update (geometry) or cost.
        pooling: a run's one number: its last round that has it, the mean of all its rows, or their sum.
        wanted: +1 if a deployer wants it high, -1 if low, 0 if neither.
        headline: whether it is a column of the comparison table.
        meaning: what it is.
        limits: what it is not.
    """

    name: str
    label: str
    role: Role = "leakage"
    pooling: Pooling = "mean"
    wanted: int = 0
    headline: bool = True
    meaning: str = ""
    limits: str = ""


_KNOWN = (
    Quantity(
        "accuracy",
        "Accuracy",
        "utility",
        "last",
        1,
        meaning="Share of held-out test examples that the global model classifies correctly.",
        limits="Not the accuracy on any one client's data. Round 0 is the model before training.",
    ),
    Quantity(
        "loss",
        "Test loss",
        "utility",
        "last",
        -1,
        False,
        meaning="Mean cross-entropy of the global model on the held-out test examples.",
        limits="Not comparable between datasets with different numbers of classes.",
    ),
    Quantity(
        "train-loss",
        "Local training loss",
        "utility",
        "last",
        -1,
        False,
        meaning="Mean loss each client reports on its own data while training.",
        limits="Reported by the clients themselves and not verified.",
    ),
    Quantity(
        "mutual-information",
        "Mutual information",
        "leakage",
        "mean",
        -1,
        meaning="Estimated nats that a protected gradient gives about the batch it was computed from. A "
        "trained critic must tell the true batch from other candidates on batches it has not seen, so the "
        "value cannot exceed its ceiling ln K for K candidates.",
        limits="Not an upper bound on leakage: a low value can also mean a weak critic, and a value at the "
        "ceiling means 'at least this much'. Read it beside its ceiling and its permutation p-value, both "
        "listed under the settings.",
    ),
    Quantity(
        "example-gradient-uniqueness",
        "Example gradient uniqueness",
        "leakage",
        "mean",
        -1,
        meaning="How far one example's gradient stands out of the client's other gradients and noise: "
        "GNQ = g·(S + λI)⁻¹g, with S the second moments of the others and λ the ridge or the noise; "
        "the mean over the client's examples.",
        limits="Not a guarantee: an adversary who knows all the other examples is not covered. It depends on "
        "λ, which is listed under the settings; a mean hides the most exposed example.",
    ),
    Quantity(
        "example-gradient-uniqueness" + BOUND,
        "Example uniqueness bound",
        "leakage",
        "mean",
        -1,
        meaning="½ ln(1 + GNQ): at most this many nats about whether an example took part are in one step, "
        "for an observer who is uncertain about the other examples (Gaussian approximation of their sum).",
        limits="Not a differential-privacy guarantee, and per step: over steps and rounds it adds up.",
    ),
    Quantity(
        "cohort-gradient-uniqueness",
        "Cohort gradient uniqueness",
        "leakage",
        "mean",
        -1,
        meaning="How far one client's whole update stands out of the same round's other updates; the same "
        "formula with updates in place of gradients. Needs no private data.",
        limits="Not a statement about any single example. High values also arise from unusual but harmless "
        "data and from noise that is added to the update.",
    ),
    Quantity(
        "cohort-gradient-uniqueness" + BOUND,
        "Cohort uniqueness bound",
        "leakage",
        "mean",
        -1,
        False,
        meaning="½ ln(1 + GNQ) of the cohort: nats about whether the client took part, for an observer of "
        "the sum.",
        limits="Not about a single example, and not against a server that sees each update separately.",
    ),
    Quantity(
        "privacy-tokens",
        "Privacy-token information",
        "leakage",
        "mean",
        -1,
        meaning="Held-out InfoNCE, in nats, of a critic that sees a learnt summary of the gradient (the "
        "privacy token) and the model's own activations for the batch.",
        limits="Not an upper bound, at most ln K, and not the published statistic, which is the "
        "difference on training batches and stands under the settings.",
    ),
    Quantity(
        "usable-information",
        "Usable information about the input",
        "leakage",
        "mean",
        -1,
        meaning="Nats by which a stated family of decoders narrows down an example's pixels when it sees the "
        "released gradient, on held-out examples.",
        limits="Relative to the decoders: another family, or an attack that optimises, may find more. "
        "Negative values mean that decoding did worse than guessing. It grows with the number of examples.",
    ),
    Quantity(
        "usable-attribute-information",
        "Usable information about an attribute",
        "leakage",
        "mean",
        -1,
        meaning="Nats a probe gains about a latent attribute of an example from its released gradient, on "
        "held-out examples; at most the attribute's entropy.",
        limits="Relative to the probe, and noisy with few examples. Negative values mean worse than "
        "guessing.",
    ),
    Quantity(
        "subspace-distance",
        "Subspace distance by attribute",
        "leakage",
        "mean",
        -1,
        meaning="Angle in radians between the main directions of gradients with and without a latent "
        "attribute, minus that between random halves with the same attribute.",
        limits="Read it against the null's spread under the settings: within it, nothing was found.",
    ),
    Quantity(
        "gradient-sensitivity",
        "Gradient sensitivity",
        "leakage",
        "mean",
        0,
        meaning="How much the gradient of an example changes, relative to itself, when the example does.",
        limits="Of the unprotected gradient: clipping and noise do not enter. A large value does not say "
        "that an inversion succeeds.",
    ),
    Quantity(
        "input-curvature",
        "Input-loss curvature",
        "leakage",
        "mean",
        0,
        meaning="Second derivative of the loss by the input (see the variant under the settings), a proxy "
        "for how strongly examples are memorised.",
        limits="A ranking within one task; no absolute scale, no bound. Beside an example-level guarantee "
        "the settings hold the most memorisation that it allows.",
    ),
    Quantity(
        "membership-inference",
        "Membership inference (AUC)",
        "leakage",
        "mean",
        -1,
        False,
        meaning="The chance that a server's score ranks an example a client holds above one it does not, by "
        "the client's update; 0.5 is guessing. True-positive rates at 1 % and 0.1 % false positives, a "
        "control that must lie near 0.5 and, where noise is known, its envelope stand under the settings.",
        limits="One score's success, not a bound: another may find more. An average over thresholds hides a "
        "few examples that are named for certain. It needs reference examples like the clients' own.",
    ),
    Quantity(
        "censored-examples",
        "Examples left out",
        "leakage",
        "mean",
        0,
        False,
        meaning="How many of its most unique examples a client left out of the round.",
        limits="Says what was removed, not how exposed the examples are that stayed.",
    ),
    Quantity(
        "uniqueness-before",
        "Uniqueness before removal",
        "leakage",
        "mean",
        0,
        False,
        meaning="Mean GNQ, among all of a client's examples, of those that it then trains on.",
        limits="Of the examples that stay alone; those that were removed stand under the settings.",
    ),
    Quantity(
        "uniqueness-before-max",
        "Largest uniqueness before removal",
        "leakage",
        "mean",
        0,
        False,
        meaning="The largest such GNQ.",
        limits="One example of each client.",
    ),
    Quantity(
        "uniqueness-after",
        "Uniqueness after removal",
        "leakage",
        "mean",
        -1,
        False,
        meaning="Mean GNQ of the same examples among one another, after the most unique were removed, at the "
        "same ridge. It can only be higher than before: its rise is how far removal exposed the next layer.",
        limits="Not a guarantee, and no evidence that the examples left out are safe: their absence decides "
        "who stays.",
    ),
    Quantity(
        "uniqueness-after-max",
        "Largest uniqueness after removal",
        "leakage",
        "mean",
        -1,
        False,
        meaning="The largest such GNQ: near the smallest that was removed (under the settings), the next "
        "layer of the onion is as exposed as the last.",
        limits="One example of each client.",
    ),
    Quantity(
        "update-norm",
        "Update norm",
        "update",
        "mean",
        0,
        False,
        meaning="Euclidean norm of a client's update.",
        limits="Not a measure of leakage by itself; noise raises it and clipping lowers it.",
    ),
    Quantity(
        "update-cosine",
        "Cosine to the cohort's mean",
        "update",
        "mean",
        0,
        False,
        meaning="Cosine between a client's update and the mean update of the round.",
        limits="Not a measure of leakage by itself; it falls with noise and with unusual data alike.",
    ),
    Quantity(
        "noise-multiplier",
        "Noise multiplier",
        "update",
        "mean",
        0,
        False,
        meaning="Standard deviation of a round's noise over its clip norm, as the client states it, where a "
        "defense changes it between rounds.",
        limits="Stated by the clients; `audit.verify` and `fedaudit verify` test it against the updates.",
    ),
    Quantity(
        "clip-norm",
        "Clip norm of the server",
        "update",
        "mean",
        0,
        False,
        meaning="The norm that the strategy's privacy wrapper clipped this round's updates to.",
        limits="As the strategy states it; tests of claims say whether the aggregate shows it.",
    ),
    Quantity(
        "*.psnr",
        "reconstruction PSNR",
        "attack",
        "mean",
        -1,
        meaning="Peak signal-to-noise ratio of the reconstructed against the true images, in dB: higher is a "
        "closer copy. Beside each recorded image stands what a uniform image of its mean would score.",
        limits="The success of one attack under its stated conditions, not a limit on what another could do.",
    ),
    Quantity(
        "*.ssim",
        "structural similarity",
        "attack",
        "mean",
        -1,
        False,
        meaning="Structural similarity of reconstructed and true images; 1 is identical.",
        limits="Unreliable on images of a few pixels; the success of one attack only.",
    ),
    Quantity(
        "*.mse",
        "mean squared error",
        "attack",
        "mean",
        1,
        False,
        meaning="Mean squared error per pixel between reconstructed and true images.",
        limits="The success of one attack only; unbounded if the attack diverges.",
    ),
    Quantity(
        "*.label-accuracy",
        "label recovery",
        "attack",
        "mean",
        -1,
        False,
        meaning="Share of the batch's labels that the attack recovered.",
        limits="Trivially 1 where the attack was given the labels; see the attack's conditions.",
    ),
    Quantity(
        "*.recovered",
        "examples recovered",
        "attack",
        "mean",
        -1,
        False,
        meaning="Share of the examples behind an update that the attack shows with more than 20 dB PSNR, "
        "after reconstructions were matched to them one to one.",
        limits="Plain PSNR: a shifted or mirrored copy does not count. The success of one attack only.",
    ),
    Quantity(
        "*.registered-psnr",
        "registered PSNR",
        "attack",
        "mean",
        -1,
        False,
        meaning="PSNR in dB at the best shift by a few whole pixels, or mirror image, of a reconstruction.",
        limits="A best of many comparisons: a guess gains parts of a decibel too, so compare it with that "
        "of a guess. Rotation and scale are not undone.",
    ),
    Quantity(
        "*.identifiability",
        "identifiability",
        "attack",
        "mean",
        -1,
        False,
        meaning="Share of reconstructions whose nearest neighbour in pixels, among the batch, the client's "
        "other examples and the server's reference examples, is the true example.",
        limits="Read it against its chance level, the batch's share of the pool: a larger pool is harder. "
        "Pointing to an example is not showing it.",
    ),
    Quantity(
        "*.feature-identifiability",
        "identifiability by features",
        "attack",
        "mean",
        -1,
        False,
        meaning="The same with distances between what the broadcast model's last linear layer is given.",
        limits="Of an untrained model these features are a random projection. Same chance level.",
    ),
    Quantity(
        "*.lpips",
        "LPIPS",
        "attack",
        "mean",
        1,
        False,
        meaning="Learnt perceptual distance between reconstructed and true images: 0 is equal, unrelated "
        "ones have about 0.7.",
        limits="Fitted to larger photographs; the success of one attack only.",
    ),
    Quantity(
        "round-seconds",
        "Time",
        "cost",
        "sum",
        -1,
        False,
        meaning="Wall-clock seconds of all rounds together, audit included.",
        limits="Not comparable between machines.",
    ),
)

TABULATED = frozenset(("recovered", "registered-psnr", "identifiability", "feature-identifiability", "lpips"))
"""Scores of attacks that the report has in its table of scores, without a figure of their own."""

_BY_NAME = {known.name: known for known in _KNOWN}
_ORDER = {known.name: place for place, known in enumerate(_KNOWN)}
_ROLES = ("utility", "leakage", "attack", "update", "cost")
PRIVACY = "epsilon"
"""The quantity that is read from the columns epsilon, delta, privacy_unit and accountant instead."""


def describe(name: str) -> Quantity:
    """What is known about a quantity; one that is not listed counts as a measure of leakage.

    >>> describe("dlg.psnr").label
    'DLG: reconstruction PSNR'
    >>> describe("curvature").label
    'Curvature'
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.endswith(LAYER):
        whole = describe(name.removesuffix(LAYER))
        return replace(whole, name=name, label=f"{whole.label} by layer", headline=False)
    owner, dot, score = name.partition(".")
    if dot and f"*.{score}" in _BY_NAME:
        known = _BY_NAME[f"*.{score}"]
        return replace(known, name=name, label=f"{_title(owner, short=True)}: {known.label}")
    if dot:
        label = f"{_title(owner, short=True)}: {score.replace('-', ' ')}"
        return Quantity(name, label, "attack", headline=False)
    base = name.removesuffix(BOUND)
    if base != name:
        meaning = "Upper bound in nats that goes with " + describe(base).label.lower() + "."
        return Quantity(name, f"{_title(base)} bound", wanted=-1, headline=False, meaning=meaning)
    summary = MEASURES[name].summary if name in MEASURES else ""
    meaning = f"{summary[:1].upper()}{summary[1:]}." if summary else ""
    return Quantity(name, _title(name), meaning=meaning)


def order(name: str) -> tuple[int, int, str]:
    """Sort key that puts utility before leakage before attacks, known before new."""
    known = describe(name)
    score = f"*.{name.partition('.')[2]}"
    place = _ORDER.get(name, _ORDER.get(score, len(_ORDER)))
    return _ROLES.index(known.role), place, name


def with_unit(label: str, unit: str) -> str:
    """Label and unit as on an axis; the unit "1" is left out.

    >>> with_unit("Mutual information", "nats"), with_unit("Accuracy", "1")
    ('Mutual information [nats]', 'Accuracy')
    """
    return label if unit in ("1", "") else f"{label} [{unit}]"


def _title(name: str, short: bool = False) -> str:
    words = name.replace("-", " ")
    return words.upper() if short and len(words) <= 4 else words[:1].upper() + words[1:]
