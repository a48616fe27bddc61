"""What ends a command early and is no fault of the program."""


class UserError(Exception):
    """One line that names the file, row, key or flag and says what to do; the command line then exits with 2."""


class Preempted(Exception):
    """The machine is being taken away, and everything is saved: the same command goes on."""
