"""Serves a sequence classifier of transformers: texts, or pairs of texts, to labels.

Parameters: `model_folder` (relative to the version's folder), `top_k` (labels in the answer), `dtype`, `threads`.
"""

from __future__ import annotations

from typing import Any

import on_torch
from labels import Labels
from serving import answer, parameters, version_folder
from texts import TextReader, Texts, alike


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        import torch
        from transformers import AutoModelForSequenceClassification

        self.torch = torch
        settings = parameters(args)
        folder = version_folder(args) / settings["model_folder"]
        device = on_torch.device(args, settings)
        dtype = on_torch.number_type(device, settings)
        self.model = on_torch.pretrained(AutoModelForSequenceClassification, folder, device, dtype)
        tokenizer = on_torch.tokenizer(folder)
        self.reader = TextReader(tokenizer, device, on_torch.longest_input(self.model, tokenizer))
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:
            # Decoders find the last token of each text by it.
            config.pad_token_id = tokenizer.pad_token_id
        self.labels = Labels(self.model.config, int(settings.get("top_k", "5")))

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.reader.read, alike, self.run)

    def run(self, jobs: list[Texts]) -> list[list[Any]]:
        with self.torch.inference_mode():
            logits = self.model(**self.reader.tensors(jobs)).logits.float().cpu()
        return [self.labels.tensors(part.numpy()) for part in logits.split([len(job) for job in jobs])]
