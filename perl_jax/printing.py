"""Texts of data sets and models as a terminal may show them."""

from __future__ import annotations

import re

_HIDDEN = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]')


def printable(text: str) -> str:
    r"""Return `text` with control characters escaped, such as '\x1b' of a terminal sequence; line breaks and tabs stay.

    Printed as they are, they could move the cursor, change the title, or reverse the direction of what follows.
    """
    return _HIDDEN.sub(lambda match: match[0].encode('unicode_escape', 'surrogatepass').decode('ascii'), text)
