"""Text from elsewhere, made safe to print: one line, and nothing that a terminal obeys."""


def printable(text: str) -> str:
    """Return the text with control characters, line ends and bidi marks as escapes."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )
