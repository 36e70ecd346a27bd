"""Test pictures and published weights from their public addresses. Needs no PyTorch, which takes seconds."""
