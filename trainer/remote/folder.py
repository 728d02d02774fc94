"""Where the page of a run is served, from the run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from events.safe_files import open_below
from trainer.remote.errors import ConnectError

_ADDRESS_NAME = "live.json"
_MOST_BYTES = 2**14


class _Address(msgspec.Struct):
    url: str
    token: str | None = None


def link_of(given: Any) -> str:
    """Return the link to the page of a run whose folder is given; an address as it is. Waits for the disk.

    Raises:
        ConnectError: The folder names no page, or another user has written the name: the token of this user must not
            go there.
    """
    link: str = given
    if not isinstance(given, str | os.PathLike) or given == "" or (isinstance(given, str) and "://" in given):
        return link
    folder = Path(given)
    try:
        if not folder.is_dir():
            return os.fspath(given)
        file = open_below(folder, _ADDRESS_NAME)
    except FileNotFoundError:
        raise ConnectError(
            f"{folder} has no {_ADDRESS_NAME}, so no page of this run is served; add the sink Live, or connect to the"
            " link that stagecast watch prints"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise ConnectError(f"{folder} cannot be read ({error}); give the address of a page") from error
    try:
        if hasattr(os, "geteuid") and os.fstat(file).st_uid != os.geteuid():
            raise ConnectError(f"{folder / _ADDRESS_NAME} belongs to another user; give the address of the page")
        address = msgspec.json.decode(os.read(file, _MOST_BYTES), type=_Address)
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConnectError(
            f"{folder / _ADDRESS_NAME} cannot be read ({error}); give the address of the page"
        ) from error
    finally:
        os.close(file)
    return address.url if address.token is None else f"{address.url}#token={quote(address.token, safe='')}"
