"""Test pictures and published weights from their public addresses."""
