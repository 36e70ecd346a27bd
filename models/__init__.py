"""The networks. Importing this quietens a deprecation warning of a package that CompressAI imports."""

import warnings

STRIDE = 128  # sides of pictures, padded, are multiples of this: 16 of analysis × the 8 of its windows

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
