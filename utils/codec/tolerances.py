"""How near a file has to come to the size that is asked for: shares of the bits that are aimed at."""

CLOSE = 1e-3  # a trial this near to the target is the last
TARGET_TOLERANCE = 5e-3  # a file this near to its target is as good as one that meets it
CAP_MARGIN = 3e-3  # how far under a cap is aimed
CLOSE_ENOUGH = 7e-3  # how near to the aim is good enough when the trials are used up
FAR_OFF = 2e-2  # a file so far from its target is not the best there is: files all over the range are tried
CLEARLY_APART = 0.2  # bits at an end of the range that differ so much from all others are the extreme
REFINED_TOLERANCE = 3e-3  # how far from a target's rate refined latents may be
REFINED_CAP_MARGIN = 1.5 * REFINED_TOLERANCE  # how far under a cap they are kept
FAR_BELOW_CAP = 3 * CLOSE_ENOUGH  # where even the largest file is so far below a cap, the rate is not controlled
