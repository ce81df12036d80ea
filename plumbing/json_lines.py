"""One line of a .jsonl file."""

import json


def parse_line(line: bytes):
    """The JSON value of one line of a file, a byte order mark before it or not.

    Raises ValueError.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("the line is not UTF-8: save the file in that encoding") from None
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the line is not one JSON object: {error}") from None
