"""What a Hugging Face model does, by the name of its class: the one thing in config.json that always tells."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

TASKS: tuple[tuple[str, str], ...] = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForSequenceClassification", "text-classification"),
    ("ForImageClassification", "image-classification"),
    ("ForImageClassificationWithTeacher", "image-classification"),
    ("ForMaskedLM", "feature-extraction"),
    ("ForPreTraining", "feature-extraction"),
)
"""Ends of class names, and the task that the model is served for. Masked-language models serve their embeddings."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("ForConditionalGeneration", "turns one sequence, or an image or sound, into another"),
    ("ForSeq2SeqLM", "turns one sequence into another"),
    ("ForTokenClassification", "labels tokens"),
    ("ForQuestionAnswering", "finds answers in a text"),
    ("ForMultipleChoice", "chooses among answers"),
    ("ForObjectDetection", "finds objects in images"),
    ("ForSemanticSegmentation", "segments images"),
    ("ForDepthEstimation", "estimates depth"),
    ("ForSpeechSeq2Seq", "writes down speech"),
    ("ForCTC", "writes down speech"),
    ("ForAudioClassification", "classifies sound"),
    ("ForVideoClassification", "classifies videos"),
    ("ForZeroShotImageClassification", "classifies images by words"),
    ("VisionModel", "embeds images"),
    ("EncoderModel", "is one half of a model that turns one sequence into another"),
)

SERVED = "text generation, text classification, feature extraction from text, and image classification"


@dataclass(frozen=True, slots=True)
class Task:
    architecture: str | None
    task: str | None
    unsupported: str = ""
    """Why there is no task, for a person; empty when there is one."""


def task_of(config: Mapping[str, Any], names: Container[str]) -> Task:
    """The task of the model that `config` describes; `names` are the files beside it."""
    architectures = config.get("architectures")
    named = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    if not named:
        return Task(None, None, "config.json names no class under `architectures`, so what the model does is not known")
    architecture = named[0]
    if config.get("is_encoder_decoder") is True and not architecture.endswith("ForSequenceClassification"):
        return _not_served(architecture, "turns one sequence into another")
    for end, task in TASKS:
        if architecture.endswith(end):
            return Task(architecture, task)
    for end, what in UNSUPPORTED:
        if architecture.endswith(end):
            return _not_served(architecture, what)
    if architecture.endswith("Model"):
        return _bare(architecture, config, names)
    return _not_served(architecture, "has a class that says nothing of what it does")


def _bare(architecture: str, config: Mapping[str, Any], names: Container[str]) -> Task:
    """A model without a head: one that reads text gives its embeddings."""
    if "text_config" in config and "vision_config" in config:
        return _not_served(architecture, "takes images and text together")
    if isinstance(config.get("vocab_size"), int) and "preprocessor_config.json" not in names:
        return Task(architecture, "feature-extraction")
    return _not_served(architecture, "has no head and takes no text")


def _not_served(architecture: str, what: str) -> Task:
    return Task(
        architecture,
        None,
        f"{architecture} {what}, and Modelium serves {SERVED} from Hugging Face folders: for others, drop a Triton "
        "model directory, an ONNX export, or install a plugin that serves them",
    )
