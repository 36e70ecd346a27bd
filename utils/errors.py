"""What a user can put right."""


class UserError(Exception):
    """Something that the user can put right: one line that says what is wrong and names the file or the flag."""
