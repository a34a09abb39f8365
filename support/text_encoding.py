"""The rule by which all text is read: UTF-8, without a byte order mark, otherwise unchanged."""

import codecs

HEAD = 1024  # bytes at the start of a file that show its encoding
# The mark of UTF-32-LE begins with that of UTF-16-LE.
OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def find_start(head: bytes) -> int:
    """The position of the text in a file that begins with `head`: 3 after a byte order mark, or 0.

    Raises ValueError, with the remedy, for UTF-16 and UTF-32: such a file has one of their marks,
    or NUL in more than a quarter of its first HEAD bytes.
    """
    head = head[:HEAD]
    if head.startswith(OTHER_MARKS) or 4 * head.count(0) > len(head):
        raise ValueError("UTF-16 or UTF-32; convert it: iconv -f UTF-16 -t UTF-8")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def decode(data: bytes) -> str:
    """The text of a file's bytes. Raises ValueError, with the remedy, if they are not UTF-8."""
    start = find_start(data)
    try:
        return data[start:].decode()
    except UnicodeDecodeError as error:
        where, remedy = start + error.start, "convert it: iconv -f WINDOWS-1252 -t UTF-8"
        raise ValueError(f"not UTF-8 at byte {where:,}; {remedy}") from None
