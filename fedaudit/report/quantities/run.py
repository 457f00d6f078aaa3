"""What a reader must know about utility, the geometry of updates, and cost."""

from fedaudit.report.quantities.quantity import Quantity

UTILITY = (
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
)
"""How well the global model does."""

UPDATE = (
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
)
"""What updates look like, leakage aside."""

COST = (
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
"""What it took."""
