"""The plugins that Modelium ships. They use the same hooks, and import no more, than anybody's."""

BUILTIN_PLUGINS = (
    "modelium.builtin.onnx",
    "modelium.builtin.openvino",
    "modelium.builtin.huggingface",
    "modelium.builtin.torchscript",
    "modelium.builtin.python_model",
    "modelium.builtin.recognised",
    "modelium.builtin.scanners",
    "modelium.builtin.pickle_converter",
    "modelium.builtin.brain",
    "modelium.builtin.lru",
    "modelium.builtin.devices",
)
"""Names of modules, so that nothing is imported before it is wanted; a plugin is called by its last part."""
