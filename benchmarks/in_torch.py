"""An image encoder in PyTorch on the GPU: what engines are compared with (see gpu.py)."""

import time
from collections.abc import Callable
from typing import Any

from runtime.errors import BackendUnavailable
from runtime.manifest import ImageSpec

Encode = Callable[[Any], Any]


class Torch:
    """The encoder in PyTorch: eager, compiled, its operations, and the GPU's own peak."""

    def __init__(self, name: str, spec: ImageSpec, device: str = "cuda") -> None:
        try:
            import torch

            from training.model import create
        except ImportError as error:
            raise BackendUnavailable(f"PyTorch cannot be imported: {error}") from error
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailable("PyTorch finds no GPU")
        self._torch, self._device = torch, device
        self._model = create(name).model.to(device, torch.float16).eval()
        self._mean, self._std = (
            torch.tensor(values, device=device, dtype=torch.float16).view(1, 3, 1, 1)
            for values in (spec.mean, spec.std)
        )
        self._shape = (1, 3, spec.height, spec.width)

    def ways(self) -> dict[str, Encode]:
        """Frames, uint8 [N, H, W, 3], to embeddings, with the copies to the GPU and back."""
        encode = self._model.encode_image
        compiled = self._torch.compile(encode, mode="reduce-overhead")
        return {"PyTorch fp16": self._way(encode), "PyTorch fp16, compiled": self._way(compiled)}

    def _way(self, encode: Any) -> Encode:
        def run(batch: Any) -> Any:
            with self._torch.inference_mode():
                pixels = self._torch.from_numpy(batch).to(self._device).permute(0, 3, 1, 2)
                scaled = (pixels.half() / 255 - self._mean) / self._std
                return encode(scaled, normalize=True).float().cpu().numpy()

        return run

    def operations(self) -> float:
        """Floating point operations of one frame: two for a multiplication with its sum."""
        from torch.utils.flop_counter import FlopCounterMode

        pixels = self._torch.zeros(self._shape, device=self._device, dtype=self._torch.float16)
        with FlopCounterMode(display=False) as counter:
            self._model.encode_image(pixels)
        return float(counter.get_total_flops())

    def peak(self, side: int = 8192, times: int = 50) -> float:
        """Operations a second of a large fp16 product."""
        torch = self._torch
        a = torch.randn(side, side, device=self._device, dtype=torch.float16)
        for _ in range(3):
            a @ a
        self._wait()
        start = time.perf_counter()
        for _ in range(times):
            a @ a
        self._wait()
        return 2 * side**3 * times / (time.perf_counter() - start)

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()
