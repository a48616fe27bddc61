"""The one error that a user can cause and mend."""


class UserError(Exception):
    """One line that names the file, row, key or flag and says what to do; the command line then exits with 2."""
