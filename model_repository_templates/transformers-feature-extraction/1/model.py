"""Serves an encoder of transformers: texts to the embedding of each token, and to one embedding of the whole.

The whole is pooled and normalized as the folder's own sentence-transformers files say, else it is the tokens' mean.
Parameters: `model_folder` (relative to the version's folder), `dtype`, `threads`.
"""

from __future__ import annotations

from typing import Any

import on_torch
import triton_python_backend_utils as pb_utils
from pooling import how_to_pool
from serving import answer, parameters, version_folder
from texts import TextReader, Texts, alike


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # Imported here, because Triton also starts this file only to ask for its configuration.
        import torch
        from transformers import AutoModel

        self.torch = torch
        settings = parameters(args)
        folder = version_folder(args) / settings["model_folder"]
        device = on_torch.device(args, settings)
        dtype = on_torch.number_type(device, settings)
        self.model = on_torch.pretrained(AutoModel, folder, device, dtype, may_lack=("pooler",))
        tokenizer = on_torch.tokenizer(folder)
        self.reader = TextReader(tokenizer, device, on_torch.longest_input(self.model, tokenizer))
        self.pooling, self.normalized = how_to_pool(folder)

    def execute(self, requests: list[Any]) -> list[Any]:
        return answer(requests, self.reader.read, alike, self.run)

    def run(self, jobs: list[Texts]) -> list[list[Any]]:
        with self.torch.inference_mode():
            inputs = self.reader.tensors(jobs)
            tokens = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"]
            wholes = self.pool(tokens, mask)
        counts = [len(job) for job in jobs]
        parts = zip(jobs, tokens.split(counts), mask.split(counts), wholes.split(counts), strict=True)
        return [self.tensors(job, *part) for job, *part in parts]

    def tensors(self, job: Texts, tokens: Any, mask: Any, wholes: Any) -> list[Any]:
        """Only what was asked for, and as long as this request's own longest text."""
        used = mask.any(dim=0).nonzero().flatten()
        window = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0)
        made = {
            "last_hidden_state": tokens[:, window],
            "attention_mask": mask[:, window].long(),
            "sentence_embedding": wholes,
        }
        return [
            pb_utils.Tensor(name, values.contiguous().cpu().numpy())
            for name, values in made.items()
            if name in job.wanted
        ]

    def pool(self, tokens: Any, mask: Any) -> Any:
        """One vector for each text; `tokens` is [texts, length, width], `mask` [texts, length]."""
        present = mask.unsqueeze(-1).to(tokens.dtype)
        if self.pooling == "cls":
            rows = mask.argmax(dim=1)
            whole = tokens[self.torch.arange(len(tokens), device=tokens.device), rows]
        elif self.pooling == "lasttoken":
            rows = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
            whole = tokens[self.torch.arange(len(tokens), device=tokens.device), rows]
        elif self.pooling == "max":
            whole = tokens.masked_fill(present == 0, float("-inf")).amax(dim=1)
        else:
            whole = (tokens * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        return self.torch.nn.functional.normalize(whole, dim=1) if self.normalized else whole
