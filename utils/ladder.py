"""The λ ladders, and the index that stands for λ: the one place that knows either.

A rate is named by an index in [0, 5], a float: whole indices are the six λ of the published
models, and between them λ is interpolated geometrically (utils/lambdas.py).
"""

LADDERS = {
    "mse": (0.0025, 0.0035, 0.0067, 0.0130, 0.0250, 0.05),
    # Those that TCM's authors trained their six MS-SSIM models at (CVPR 2023, arXiv 2303.14978, section 4.1).
    "ms-ssim": (3.0, 5.0, 8.0, 16.0, 36.0, 64.0),
}
LADDER = LADDERS["mse"]
MAX_INDEX = float(len(LADDER) - 1)
