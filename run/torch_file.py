"""Files of torch.save: read without running code from them, and compared with what was written."""

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch

from run.cli import Damaged, UserError


def read_torch_file(path: str | Path, flag: str) -> Any:
    """-> the content, on the CPU. flag: the flag that names the file, for error messages.

    Raises Damaged if the file is not as it was written, UserError if it cannot be read.
    """
    try:
        if record := zipfile.is_zipfile(path) and _first_changed_record(path):
            raise Damaged(f"{flag}: {path} is damaged: its record {record} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a seek to a position that no file can have
            raise Damaged(f"{flag}: {path} is damaged: its table of contents is invalid") from error
        kind = Damaged if error.errno == errno.EIO else UserError
        raise kind(f"{flag}: {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling raises almost any exception on a file of another kind
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{flag}: too little memory to read {path}") from error
        raise Damaged(f"{flag}: {path} is damaged, cut short, or not a PyTorch file") from error


def _first_changed_record(path):
    """-> the name of a record that does not match its CRC-32, which torch.load does not check, or None."""
    with zipfile.ZipFile(path) as file:
        return file.testzip()
