"""What is left of a write that failed."""

from __future__ import annotations

import errno
import io

import pytest
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from nemotron3_megatron.checkpoint.writing import system_error


def test_no_call_that_failed_keeps_a_buffer() -> None:
    """As torch writes to a full disk. A ``BytesIO`` whose buffer is held somewhere cannot be closed."""
    data = io.BytesIO(bytes(1_000_000))
    with open("/dev/full", "wb", buffering=0) as full:
        stream, _ = _StorageWriterTransforms().transform_save_stream(None, full)  # type: ignore[arg-type]
        try:
            stream.write(data.getbuffer())
        except OSError as error:
            with pytest.raises(BufferError):
                data.close()
            found = system_error(error)
            data.close()
    assert isinstance(found, OSError)
    assert found.errno == errno.ENOSPC
