"""What a reader must know about each measure of leakage: what it is, and what it is not."""

from fedaudit.report.quantities.quantity import BOUND, Quantity

LEAKAGE = (
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
)
"""In the order they are shown."""
