"""The networks. Importing this quietens a deprecation warning of a package that CompressAI imports."""

import warnings

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
