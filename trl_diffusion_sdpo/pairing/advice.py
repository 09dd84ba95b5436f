"""Training advice for pairs whose loser is made from the winner."""

# The numbers are those of the section "Aligned pairs" in docs/measurements.md.
ALIGNED_SETTINGS = {"safeguard": "output", "safeguard_mu": 0.9}

ALIGNED_ADVICE = (
    "Winner and loser of these pairs share most of their content. Train them with a strict safeguard: "
    "`safeguard: output` with `safeguard_mu: 0.9`, or `safeguard: parameter` with `safeguard_mu: 0.8`. Do not train "
    "them without a safeguard: plain Diffusion-DPO raised the error on the winners tenfold to fiftyfold in a small "
    "world, and its images became worse than the base model's. If the accuracy on held-out pairs stays near 0.5, raise "
    "the learning rate before you lower mu."
)

NEGATIVES_ADVICE = (
    "Trained as they are, these pairs move the model towards its own guided images, so that it needs less guidance. "
    "Trained with `swap_labels: true`, they give a model of what not to draw: the negative model of preference "
    "guidance. They hold no judgement of a person or a scorer, so compare the result with the base model."
)
