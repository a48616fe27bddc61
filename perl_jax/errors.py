"""What ends a command early and is no fault of the program."""


class UserError(Exception):
    """One line that names the file, row, key or flag and says what to do; the command line then exits with 2."""


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`; `name` is the macro or flag as its user writes it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f'{name} = {value!r}: give a whole number of at least {least}')


class Preempted(Exception):
    """The machine is being taken away, and everything is saved: the same command goes on."""
