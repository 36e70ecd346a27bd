"""What a user can put right: printed as one line, without a traceback (utils/cli.py)."""


class UserError(Exception):
    """One line that says what is wrong, with the file's or the flag's name."""


class ImageError(UserError):
    """A picture that cannot be read."""


class CheckpointError(UserError):
    """A file that is no checkpoint of ours or of the published models."""
