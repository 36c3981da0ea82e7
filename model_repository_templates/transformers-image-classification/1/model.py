"""Serves an image classifier of transformers: encoded images, or tensors of pixels, to labels.

Parameters: `model_folder` (relative to the version's folder), `top_k` (labels in the answer), `dtype`, `threads`.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import on_torch
from labels import Labels
from serving import Refused, answer, parameters, version_folder

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""What Pillow may read: some of its other formats start programs."""


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        import torch
        from PIL import Image
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.torch, self.image = torch, Image
        settings = parameters(args)
        folder = version_folder(args) / settings["model_folder"]
        self.device = on_torch.device(args, settings)
        dtype = on_torch.number_type(self.device, settings)
        self.model = on_torch.pretrained(AutoModelForImageClassification, folder, self.device, dtype)
        self.processor = None
        if (folder / "preprocessor_config.json").exists() or (folder / "processor_config.json").exists():
            # Pillow's variant needs no torchvision, and resizes as the reference implementations do.
            self.processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
        self.labels = Labels(self.model.config, int(settings.get("top_k", "5")))

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.read, lambda pixels: tuple(pixels.shape[1:]), self.run)

    def read(self, request: Any) -> Any:
        """The request's pixels, [images, channels, height, width]."""
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if len(given) != 1:
            raise Refused("send either image (an encoded image) or pixel_values (a tensor), one of the two")
        if "pixel_values" in given:
            return self.torch.from_numpy(given["pixel_values"].copy())
        if self.processor is None:
            raise Refused("the model came without preprocessor_config.json: send pixel_values instead of image")
        images = [self.decode(value) for value in given["image"].reshape(-1)]
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def decode(self, value: bytes) -> Any:
        """An image from a file's bytes, or from their base64 text, which JSON can carry."""
        try:
            return self.opened(value)
        except Exception as error:
            try:
                return self.opened(base64.b64decode(value, validate=True))
            except Exception:
                raise Refused(f"image must be a JPEG, PNG or alike, as bytes or as base64: {error}") from None

    def opened(self, value: bytes) -> Any:
        return self.image.open(io.BytesIO(value), formats=FORMATS).convert("RGB")

    def run(self, jobs: list[Any]) -> list[list[Any]]:
        pixels = self.torch.cat(jobs).to(self.device, self.model.dtype)
        with self.torch.inference_mode():
            logits = self.model(pixel_values=pixels).logits.float().cpu()
        return [self.labels.tensors(part.numpy()) for part in logits.split([len(job) for job in jobs])]
