import models  # noqa: F401  before any module that imports CompressAI: models/lazy.py says why
