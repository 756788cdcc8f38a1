"""What a trial's card took from the wall, where its driver counts it (NVIDIA, since Volta)."""

from typing import Any

import torch


class EnergyMeter:
    """Joules of the card of ``device`` since the meter was made; None where nobody counts them.

    A card that several trials share has one counter for all: ``share`` under 1 is not measured.
    """

    def __init__(self, device: torch.device, share: float = 1.0) -> None:
        self._handle: Any = None
        if device.type != "cuda" or share < 1:
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            self._began = self._counted()
        except pynvml.NVMLError:
            self._handle = None

    def joules(self) -> float | None:
        """So many until now."""
        return None if self._handle is None else self._counted() - self._began

    def _counted(self) -> float:
        import pynvml

        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
