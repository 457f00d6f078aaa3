"""What a reader must know about each score of a reconstruction; "*" stands for the attack."""

from fedaudit.report.quantities.quantity import Quantity

ATTACK = (
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
)
"""In the order they are shown."""

TABULATED = frozenset(("recovered", "registered-psnr", "identifiability", "feature-identifiability", "lpips"))
"""Scores of attacks that the report has in its table of scores, without a figure of their own."""
