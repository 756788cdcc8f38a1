"""How quantised weights are held: the bits of a number and the bytes of its scales, by a config's own description."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any


@dataclass(frozen=True)
class Format:
    """How linear layers are held: bits a number (0: not packed, or not known), and bytes of scales for every ``group``
    of them (0: none)."""

    name: str = ""
    bits: float = 0.0
    group: int = 0
    scale_bytes: float = 0.0
    skipped: tuple[str, ...] = ()

    def scales(self, numbers: int) -> int:
        """Bytes of scales of a matrix of ``numbers``."""
        return math.ceil(numbers / self.group * self.scale_bytes) if self.group else 0

    def packs(self, name: str) -> bool:
        """Whether the matrix of this name is held so: ``skipped`` has parts of names, ``*`` in them for any text."""
        return bool(self.bits) and not any(fnmatch(name, f"*{part}*") for part in self.skipped)


def quantization_of(config: Any, asked: str) -> tuple[bool, Format]:
    """(whether the files are packed, the format of their ``quantization_config``, or of what vLLM quantises to)."""
    given = getattr(config, "quantization_config", None) or {}
    described: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict()
    own = str(described.get("quant_method", "")).removeprefix("QuantizationMethod.").lower()
    return bool(own), _format(own or asked, described)


def _format(method: str, described: Mapping[str, Any]) -> Format:
    skipped = tuple(described.get("modules_to_not_convert") or described.get("ignore") or ()) or ("lm_head",)
    if method in ("awq", "gptq", "awq_marlin", "gptq_marlin", "auto-round"):
        bits, group = int(described.get("bits", 4)), int(described.get("group_size", 128))
        # a group has a scale in 16 bits and a zero point in as many bits as a number
        return Format(method, bits, group if group > 0 else 4096, 2 + bits / 8, skipped)
    if method.startswith("int8_") or method == "experts_int8":
        return Format(method, 8, 0, 0.0, skipped)
    if method.startswith(("fp8", "mxfp8")):
        block = described.get("weight_block_size")
        return Format(method, 8, math.prod(block) if block else 0, 4.0 if block else 0.0, skipped)
    if method == "bitsandbytes" and not described.get("load_in_8bit"):
        double = described.get("bnb_4bit_use_double_quant")
        return Format(method, 4, 64, 1 + 4 / 256 if double else 4.0, skipped)
    if method == "bitsandbytes":
        return Format(method, 8, 0, 0.0, skipped)
    if method == "compressed-tensors":
        groups: dict[str, Any] = described.get("config_groups") or {}
        weights: dict[str, Any] = next((each.get("weights") or {} for each in groups.values()), {})
        group = int(weights.get("group_size") or 0)
        return Format(method, int(weights.get("num_bits", 8)), max(group, 0), 2.0 if group > 0 else 0.0, skipped)
    if method == "mxfp4":
        return Format(method, 4, 32, 1.0, skipped)
    return Format(method)
