"""Writes and checks the files of a prepared data set, which hold records in ArrayRecord's format."""

import hashlib
import os
from collections.abc import Iterable

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from cjepa_jax.errors import UserError, one_line, require
from cjepa_jax.files import TEMPORARY


def write(path: str, records: Iterable[bytes]) -> tuple[int, str]:
    """Writes a file that is never seen half written, and reads it back; returns what `content` does.

    Raises UserError where the disk is full or does not hold what was written to it.
    """
    digest, count, temporary = hashlib.sha256(), 0, path + TEMPORARY
    try:
        writer = ArrayRecordWriter(temporary, "group_size:1")
        for record in records:
            writer.write(record)
            digest.update(hashlib.sha256(record).digest())
            count += 1
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        written = content(temporary)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be written: is the disk full? ({one_line(error)})") from None
    same = written == (count, digest.hexdigest())
    require(same, f"{path} does not hold what was written to it: check the disk, then give the same command again")
    os.replace(temporary, path)
    return written


def content(path: str) -> tuple[int, str]:
    """Returns the number of records in a file, and a digest of them all.

    Raises RuntimeError where the file is missing or damaged; some damage shows in the number or the digest only.
    """
    reader, digest = ArrayRecordReader(path), hashlib.sha256()
    try:
        count = reader.num_records()  # 0 where the end of the file is damaged
        for start in range(0, count, 64):
            for record in reader.read(start, min(start + 64, count)):
                digest.update(hashlib.sha256(record).digest())
    finally:
        reader.close()
    return count, digest.hexdigest()
