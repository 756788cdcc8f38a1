"""Names, dtypes and shapes of a model's tensors, by the headers of its safetensors files; no weight is read."""

import json
import struct
from pathlib import Path
from typing import Any

from workbench.errors import UserError


def headers_of(folder: Path) -> dict[str, Any]:
    """Name to dtype and shape of every tensor of the safetensors files in ``folder``; empty where there are none."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("adapter_"):
            continue
        try:
            with file.open("rb") as stream:
                length = struct.unpack("<Q", stream.read(8))[0]
                if length > 100 << 20:
                    raise ValueError("its header is too long")
                header = json.loads(stream.read(length))
            last = max(
                (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
            )
            if file.stat().st_size < 8 + length + last:
                raise ValueError(f"{8 + length + last - file.stat().st_size:,} bytes are missing")
        except (OSError, ValueError, struct.error, KeyError) as error:
            raise UserError(f"{file} is no whole safetensors file: {error}") from None
        found |= {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return found


def hub_headers(name: str) -> dict[str, Any]:
    """The same of a model on the hub, by ranges of its files; empty without a network."""
    from huggingface_hub import get_hf_file_metadata, get_safetensors_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
        files = get_safetensors_metadata(name).files_metadata.values()
    except Exception:  # the config, which was in the cache, is enough for an estimate
        return {}
    return {tensor: (info.dtype, info.shape) for file in files for tensor, info in file.tensors.items()}
