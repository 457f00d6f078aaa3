"""What a measure or an attack must know, and what an observer does know."""

from enum import Flag, auto


class Needs(Flag):
    """Pieces of knowledge; a measure runs only where its needs are a subset of what is known."""

    NOTHING = 0
    COHORT = auto()  # at least two updates of the same round
    SINGLE = auto()  # updates of single clients, not only the sum of several
    MODEL = auto()  # the architecture and the loss
    TRAINING = auto()  # learning rate, local steps and batch size
    SHAPE = auto()  # input shape and number of classes
    REFERENCE = auto()  # the observer's own labelled data of the same kind
    RELEASE = auto()  # how one local step is clipped and noised
    EVIDENCE = auto()  # the client's own examples: on the client, or as an oracle in simulation


REASONS = {
    Needs.COHORT: "needs at least two valid updates in the round",
    Needs.SINGLE: "needs the updates of single clients",
    Needs.MODEL: "needs the model and the loss (build_model, loss)",
    Needs.TRAINING: "needs the local learning rate, steps and batch size",
    Needs.SHAPE: "needs the input shape and the number of classes",
    Needs.REFERENCE: "needs reference data of the observer's own",
    Needs.RELEASE: "needs to know how a local step is clipped and noised",
    Needs.EVIDENCE: "needs the client's own examples (observer client or oracle)",
}


def missing(needs: Needs, known: Needs, summed: int = 0) -> str:
    """The reasons why `needs` is not covered by `known`, as one phrase; empty if it is covered.

    Args:
        needs: what is needed.
        known: what is known.
        summed: how many clients' updates are seen as their sum only; 0 where single ones are seen.

    >>> missing(Needs.MODEL | Needs.COHORT, Needs.MODEL)
    'needs at least two valid updates in the round'
    """
    lacking = [piece for piece in Needs if piece in needs and piece not in known]
    hidden = f"{REASONS[Needs.SINGLE]}, of which secure aggregation shows nothing but the sum of {summed}"
    of_singles = (Needs.COHORT, Needs.SINGLE) if summed else ()
    return "; ".join(dict.fromkeys(hidden if p in of_singles else REASONS[p] for p in lacking))
